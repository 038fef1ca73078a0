//! Reads a whole trace, from a file or from memory, within the bounds of [`super`].

use super::line::{LineError, Request};
use super::{
    DEFAULT_BLOCK_TOKENS, MAX_LINE_BYTES, MAX_REQUESTS, MAX_TOTAL_RUNS, MAX_TRACE_BYTES, SAMPLES,
    Sample,
    manifest::{self, Entry},
};
use flate2::bufread::MultiGzDecoder;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A trace in memory.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Tokens in one block.
    pub block_tokens: u32,
    /// Arrivals are rounded down to multiples of this; zero: they are exact.
    pub quantum: Duration,
    /// The requests in arrival order; never empty.
    pub requests: Vec<Request>,
}

/// What of a trace to read, and how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Tokens in one block; `None` asks the manifest beside the file.
    pub block_tokens: Option<u32>,
    /// Read at most so many requests.
    pub limit: Option<usize>,
}

/// Why a trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be opened.
    #[error("cannot open the trace {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What is in the file is no trace.
    #[error("{path}: {source}")]
    Within {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<TraceError>,
    },
    /// The bytes cannot be read or decompressed.
    #[error("line {line}: cannot read on: {source}; is the file cut off?")]
    Read {
        /// The line, from 1.
        line: u64,
        /// What the reader said.
        source: io::Error,
    },
    /// A line is too long to be one request.
    #[error("line {line} is longer than {MAX_LINE_BYTES} bytes: a trace has one request a line")]
    LineTooLong {
        /// The line, from 1.
        line: u64,
    },
    /// A line is not a request.
    #[error("line {line}: {source}")]
    BadLine {
        /// The line, from 1.
        line: u64,
        /// What is wrong with it.
        source: LineError,
    },
    /// A request arrives before the one above it.
    #[error("line {line}: it arrives before the line above; sort the trace by timestamp")]
    OutOfOrder {
        /// The line, from 1.
        line: u64,
    },
    /// The trace is larger than what is kept in memory.
    #[error("line {line}: the trace is larger than is kept in memory; read a part with a limit")]
    TooLarge {
        /// The line, from 1.
        line: u64,
    },
    /// There is no request in it.
    #[error("the trace has no requests")]
    Empty,
    /// The manifest beside the trace cannot be used.
    #[error("cannot use {path}: {reason}; give the block size, or repair the file")]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A block size that no engine has.
    #[error("a block of {0} tokens is out of range: 1 to {MAX_BLOCK_TOKENS} are allowed")]
    BlockTokens(u32),
}

impl Trace {
    /// The sample that ships with Forebay (`data/README.md` has its source and licence).
    ///
    /// # Errors
    ///
    /// As [`Trace::from_bytes`]; a limit of 0 is the only way to get one.
    pub fn sample(limit: Option<usize>) -> Result<Trace, TraceError> {
        SAMPLES[0].read(limit)
    }

    /// Reads a file, plain or gzipped.
    ///
    /// # Errors
    ///
    /// Says which line of which file is wrong and how; nothing of a trace with a bad line is returned.
    pub fn open(path: &Path, options: Options) -> Result<Trace, TraceError> {
        let file = opened(path).map_err(|source| TraceError::Open {
            path: path.to_owned(),
            source,
        })?;
        let listed = match options.block_tokens {
            // Who knows the block size needs no manifest.
            Some(_) => listed(path).unwrap_or(None),
            None => listed(path)?,
        };
        let block_tokens = options
            .block_tokens
            .or(listed.map(|listed| listed.block_size));
        let options = Options {
            block_tokens: Some(block_tokens.unwrap_or(DEFAULT_BLOCK_TOKENS)),
            ..options
        };
        let quantum = listed.map_or(0, |listed| listed.quantum_ms);
        let read = Trace::read(BufReader::new(file), options);
        let read = read.map_err(|error| match error {
            TraceError::BlockTokens(_) => error,
            _ => TraceError::Within {
                path: path.to_owned(),
                source: Box::new(error),
            },
        })?;
        Ok(Trace {
            quantum: Duration::from_millis(quantum.into()),
            ..read
        })
    }

    /// Reads a trace from memory, plain or gzipped.
    ///
    /// # Errors
    ///
    /// As [`Trace::open`].
    pub fn from_bytes(bytes: &[u8], options: Options) -> Result<Trace, TraceError> {
        Trace::read(bytes, options)
    }

    fn read(mut source: impl BufRead, options: Options) -> Result<Trace, TraceError> {
        let block_tokens = options.block_tokens.unwrap_or(DEFAULT_BLOCK_TOKENS);
        if !(1..=MAX_BLOCK_TOKENS).contains(&block_tokens) {
            return Err(TraceError::BlockTokens(block_tokens));
        }
        let limit = options.limit.unwrap_or(usize::MAX);
        let head = source
            .fill_buf()
            .map_err(|source| TraceError::Read { line: 1, source })?;
        let requests = if head.starts_with(&GZIP_MAGIC) {
            collect(
                Reader::new(BufReader::new(MultiGzDecoder::new(source))),
                limit,
            )?
        } else {
            collect(Reader::new(source), limit)?
        };
        if requests.is_empty() {
            return Err(TraceError::Empty);
        }
        Ok(Trace {
            block_tokens,
            quantum: Duration::ZERO,
            requests,
        })
    }
}

impl Sample {
    /// Reads it.
    ///
    /// # Errors
    ///
    /// As [`Trace::from_bytes`]; a limit of 0 is the only way to get one.
    pub fn read(&self, limit: Option<usize>) -> Result<Trace, TraceError> {
        let options = Options {
            block_tokens: Some(self.block_tokens),
            limit,
        };
        Ok(Trace {
            quantum: self.quantum,
            ..Trace::from_bytes(self.bytes, options)?
        })
    }

    /// The sample of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Sample> {
        SAMPLES.iter().find(|sample| sample.name == name)
    }
}

/// Reads plain JSON lines one by one; empty lines are skipped. It ends after the first error.
#[derive(Debug)]
pub struct Reader<R> {
    source: io::Take<R>,
    line: u64,
    last: Duration,
    buffer: Vec<u8>,
    ended: bool,
}

impl<R: BufRead> Reader<R> {
    /// Reads from `source`.
    pub fn new(source: R) -> Reader<R> {
        Reader {
            source: source.take(MAX_TRACE_BYTES),
            line: 0,
            last: Duration::ZERO,
            buffer: Vec::new(),
            ended: false,
        }
    }

    /// Puts the next line into the buffer; false at the end.
    fn fill(&mut self) -> Result<bool, TraceError> {
        self.line += 1;
        let line = self.line;
        self.buffer.clear();
        let most = MAX_LINE_BYTES as u64 + 1;
        let read = (&mut self.source)
            .take(most)
            .read_until(b'\n', &mut self.buffer);
        let read = read.map_err(|source| TraceError::Read { line, source })?;
        if read as u64 == most {
            return Err(TraceError::LineTooLong { line });
        }
        if self.source.limit() == 0 {
            return Err(TraceError::TooLarge { line });
        }
        Ok(read > 0)
    }

    fn parse(&mut self) -> Result<Request, TraceError> {
        let line = self.line;
        let request =
            Request::parse(&self.buffer).map_err(|source| TraceError::BadLine { line, source })?;
        if request.at < self.last {
            return Err(TraceError::OutOfOrder { line });
        }
        self.last = request.at;
        Ok(request)
    }
}

impl<R: BufRead> Iterator for Reader<R> {
    type Item = Result<Request, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            let next = match self.fill() {
                Ok(false) => {
                    self.ended = true;
                    return None;
                }
                Ok(true) if self.buffer.trim_ascii().is_empty() => continue,
                Ok(true) => self.parse(),
                Err(error) => Err(error),
            };
            self.ended = next.is_err();
            return Some(next);
        }
        None
    }
}

fn collect<R: BufRead>(mut reader: Reader<R>, limit: usize) -> Result<Vec<Request>, TraceError> {
    let mut requests = Vec::new();
    let mut runs = 0;
    while requests.len() < limit {
        let Some(request) = reader.next().transpose()? else {
            break;
        };
        runs += request.blocks.len();
        if requests.len() == MAX_REQUESTS || runs > MAX_TOTAL_RUNS {
            return Err(TraceError::TooLarge { line: reader.line });
        }
        requests.push(request);
    }
    Ok(requests)
}

/// A folder can be opened, too, but not be read.
fn opened(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    if file.metadata()?.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    Ok(file)
}

fn listed(trace: &Path) -> Result<Option<Entry>, TraceError> {
    let path = trace.with_file_name("manifest.json");
    let bad = |reason: String| TraceError::Manifest {
        path: path.clone(),
        reason,
    };
    let mut bytes = Vec::new();
    match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(bad(error.to_string())),
        Ok(file) => file
            .take(MAX_MANIFEST_BYTES)
            .read_to_end(&mut bytes)
            .map_err(|error| bad(error.to_string()))?,
    };
    let name = trace
        .file_name()
        .map(|name| name.to_string_lossy())
        .unwrap_or_default();
    manifest::entry_of(&bytes, &name).map_err(|error| bad(error.to_string()))
}

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const MAX_MANIFEST_BYTES: u64 = 1 << 20;
const MAX_BLOCK_TOKENS: u32 = 65_536;

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use proptest::prelude::*;
    use std::io::Write;

    const GOOD: &str = r#"{"timestamp":0,"input_length":6,"output_length":5,"hash_ids":[1]}"#;
    const LATER: &str = r#"{"timestamp":9,"input_length":6,"output_length":5}"#;

    fn gzip(text: &str) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    #[track_caller]
    fn check(bytes: &[u8], expected: &str) {
        let got = match Trace::from_bytes(bytes, Options::default()) {
            Ok(trace) => format!("{} requests", trace.requests.len()),
            Err(error) => error.to_string(),
        };
        assert!(got.contains(expected), "got {got:?}, expected {expected:?}");
    }

    #[test]
    fn plain_and_gzipped_read_alike() {
        let text = format!("{GOOD}\n\n{LATER}");
        check(text.as_bytes(), "2 requests");
        check(&gzip(&text), "2 requests");
        check(
            &[gzip(&format!("{GOOD}\n")), gzip(LATER)].concat(),
            "2 requests",
        );
    }

    #[test]
    fn an_error_names_its_line() {
        check(b"", "no requests");
        check(format!("{GOOD}\n{{\n").as_bytes(), "line 2: not a request");
        check(
            format!("{LATER}\n{GOOD}\n").as_bytes(),
            "line 2: it arrives before",
        );
        check(&gzip(GOOD)[..20], "line 1: cannot read on");
        check(&vec![b' '; MAX_LINE_BYTES + 1], "line 1 is longer");
        check(&gzip(&"[".repeat(MAX_LINE_BYTES * 3)), "line 1 is longer");
    }

    #[test]
    fn a_limit_stops_the_reading() {
        let text = format!("{GOOD}\nnonsense\n");
        let one = Options {
            limit: Some(1),
            ..Options::default()
        };
        assert_eq!(
            Trace::from_bytes(text.as_bytes(), one)
                .unwrap()
                .requests
                .len(),
            1
        );
    }

    #[test]
    fn the_shipped_sample_is_whole() {
        let trace = Trace::sample(None).unwrap();
        assert_eq!((trace.block_tokens, trace.requests.len()), (512, 400));
        let first = &trace.requests[0];
        assert_eq!((first.input_tokens, first.output_tokens), (6758, 500));
        for request in &trace.requests {
            let blocks = request.block_ids().count();
            assert_eq!(blocks, request.input_tokens.div_ceil(512) as usize);
            assert_eq!(
                request.block_ids().next(),
                Some(0),
                "all share the system prompt"
            );
        }
    }

    #[test]
    fn every_sample_is_found_by_its_name_and_fits_its_block_size() {
        for sample in &SAMPLES {
            let trace = Sample::named(sample.name).unwrap().read(None).unwrap();
            assert!(trace.requests.len() >= 300, "{}", sample.name);
            assert!(trace.requests.is_sorted_by_key(|request| request.at));
            let has_blocks = !sample.name.starts_with("azure");
            let size = trace.block_tokens;
            for request in &trace.requests {
                let blocks = u32::try_from(request.block_ids().count()).unwrap();
                let whole = request.input_tokens / size;
                let all = request.input_tokens.div_ceil(size);
                let expected = if has_blocks { whole..=all } else { 0..=0 };
                assert!(expected.contains(&blocks), "{}: {blocks}", sample.name);
            }
        }
        assert!(Sample::named("no-such-trace").is_none());
    }

    #[test]
    fn the_block_size_comes_from_the_caller_the_manifest_or_the_default() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        std::fs::write(&path, GOOD).unwrap();
        let size = |given| {
            let options = Options {
                block_tokens: given,
                limit: None,
            };
            Trace::open(&path, options).map(|trace| trace.block_tokens)
        };
        assert_eq!(size(None).unwrap(), 512);
        let manifest = folder.path().join("manifest.json");
        std::fs::write(
            &manifest,
            r#"{"traces":[{"file":"t.jsonl","block_size":64}]}"#,
        )
        .unwrap();
        assert_eq!(size(None).unwrap(), 64);
        assert_eq!(size(Some(16)).unwrap(), 16);
        assert!(matches!(size(Some(0)), Err(TraceError::BlockTokens(0))));
        std::fs::write(&manifest, "{").unwrap();
        assert!(matches!(size(None), Err(TraceError::Manifest { .. })));
        assert_eq!(size(Some(16)).unwrap(), 16);
        let missing = Trace::open(&folder.path().join("no"), Options::default());
        assert!(matches!(missing, Err(TraceError::Open { .. })));
    }

    #[test]
    fn an_error_in_a_file_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        let said = |path: &Path| {
            let read = Trace::open(path, Options::default());
            read.unwrap_err().to_string()
        };
        std::fs::write(&path, format!("{GOOD}\nnonsense\n")).unwrap();
        let line = format!("{}: line 2: not a request", path.display());
        assert!(said(&path).starts_with(&line), "{}", said(&path));
        std::fs::write(&path, "").unwrap();
        assert!(said(&path).contains("t.jsonl: the trace has no requests"));
        assert!(said(folder.path()).contains("cannot open the trace"));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), magic: bool) {
            let bytes = if magic { [&GZIP_MAGIC[..], &[8, 0], &bytes].concat() } else { bytes };
            let _ = Trace::from_bytes(&bytes, Options::default());
        }

        #[test]
        fn no_damaged_sample_panics(at in 0_usize..5000, byte: u8) {
            let mut bytes = SAMPLES[0].bytes.to_vec();
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = Trace::from_bytes(&bytes, Options::default());
        }
    }
}
