//! `forebay audit export` and `verify`: the chain beyond what the cluster keeps.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use clap::Args;
use forebay_consensus::fleet::archive::{self, Archive, ArchiveError, Fault, Joined, Record, Tail};
use serde::Serialize;

use super::{beginning, broken, newest, older};
use crate::context::ContextArgs;
use crate::exit::{CliError, Exit};
use crate::output::{OutputArgs, say};
use crate::verbs::ask::Asked;

/// Options of `forebay audit export`.
#[derive(Debug, Args)]
#[command(
    after_help = "The file is JSON lines: an entry each, oldest first, and a last line that says where it ends. One that exists is checked and gets what it lacks; it is replaced as a whole or not at all. Exit code 8 when it cannot go on: it is another cluster's, or entries between its end and the oldest of the control nodes' files are kept nowhere."
)]
pub(super) struct ExportArgs {
    /// Where to.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

/// Options of `forebay audit verify`.
#[derive(Debug, Args)]
#[command(
    after_help = "Names the first record that was changed, dropped or inserted, or after which the file was cut off, and exits with 1. A file whose end was cut off and written anew looks like an older export: that is told by the cluster alone, which has later entries; --complete makes these a fault."
)]
pub(super) struct VerifyArgs {
    /// An exported file; without it, what the cluster keeps is checked.
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Check the file by itself, and ask nobody.
    #[arg(long, requires = "file", conflicts_with = "complete")]
    offline: bool,
    /// The file has to hold all that the cluster has by now.
    #[arg(long, requires = "file")]
    complete: bool,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Serialize)]
struct Exported {
    schema_version: u32,
    file: PathBuf,
    first: u64,
    last: u64,
    /// Entries that the file had not.
    added: u64,
    head: String,
}

#[derive(Serialize)]
struct Verified {
    schema_version: u32,
    whole: bool,
    first: u64,
    last: u64,
    head: String,
    /// Null: nobody was asked, or there is no file.
    cluster: Option<Compared>,
}

#[derive(Serialize)]
struct Compared {
    /// Entries that both have, alike.
    shared: u64,
    /// Whether the file's chain is seen to lead into the cluster's.
    linked: bool,
    /// Entries that the cluster made after the file's last.
    newer: u64,
}

/// Runs `forebay audit export`.
pub(super) fn export(args: &ExportArgs) -> Result<(), CliError> {
    let context = args.context.resolve()?;
    let before = match File::open(&args.file) {
        Ok(file) => Some(checked(&args.file, file, |_| Ok(()))?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(at(&args.file)(error)),
    };
    let mut middle = tempfile::tempfile().map_err(at(&args.file))?;
    let (tail, now, first, have) = crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let (tail, now) = newest(&asked).await?;
        let begins = older::begins(&asked, &tail).await;
        let (first, have) = match &before {
            None => (begins, begins - 1),
            Some(before) => (before.end.first, goes_on(args, before, &tail, begins)?),
        };
        let head = before.as_ref().map(|before| before.end.head.clone());
        if have + 1 < tail.begins() {
            let mut out = BufWriter::new(&mut middle);
            let write = |record: Record| writeln!(out, "{}", record.line());
            older::each(&asked, &tail, have + 1, head, write).await?;
            out.flush().map_err(at(&args.file))?;
        }
        Ok::<_, CliError>((tail, now, first, have))
    })?;
    let new = tail.records.iter().filter(|one| one.number > have);
    let new: Vec<Record> = new.cloned().collect();
    let added = tail.count - have;
    let end = tail.end(first, now);
    let replaced = replace(&args.file, before.is_some(), middle, &new, &end);
    replaced.map_err(at(&args.file))?;
    if let Some(note) = beginning(first) {
        say(&note);
    }
    let exported = Exported {
        schema_version: 1,
        file: args.file.clone(),
        first,
        last: tail.count,
        added,
        head: tail.head,
    };
    args.output.print(&exported, || {
        format!(
            "file     {}\nentries  {first} to {}, {added} of them new\nhead     {}",
            exported.file.display(),
            exported.last,
            exported.head
        )
    });
    Ok(())
}

/// The last entry that the file has, if what is kept goes on from there.
fn goes_on(args: &ExportArgs, before: &Archive, tail: &Tail, begins: u64) -> Result<u64, CliError> {
    let file = args.file.display();
    let joined = tail.check(before).map_err(|fault| {
        CliError::because(
            Exit::Conflict,
            format!("{file} is not to be added to: {fault}"),
        )
    })?;
    let last = before.end.last;
    if joined.linked || last + 1 >= begins {
        return Ok(last);
    }
    let (from, to) = (last + 1, begins - 1);
    Err(CliError::because(
        Exit::Conflict,
        format!(
            "{file} ends at entry {last}, and entries {from} to {to} are kept nowhere any more: export to another file, and more often"
        ),
    ))
}

/// Writes the file anew beside itself, then takes its place: what it had, what nodes' files had, and the newest.
fn replace(
    path: &Path,
    exists: bool,
    mut middle: File,
    new: &[Record],
    end: &archive::End,
) -> io::Result<()> {
    let parent = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    let mut beside = tempfile::NamedTempFile::new_in(parent.unwrap_or(Path::new(".")))?;
    let mut out = BufWriter::new(beside.as_file_mut());
    if exists {
        let old = BufReader::new(File::open(path)?);
        let copied = archive::read(old, |record| writeln!(out, "{}", record.line()));
        copied.map_err(|error| match error {
            ArchiveError::Io(error) => error,
            // It was whole a moment ago.
            ArchiveError::Fault(fault) => io::Error::other(fault),
        })?;
    }
    middle.rewind()?;
    io::copy(&mut middle, &mut out)?;
    archive::write(&mut out, new, end)?;
    out.flush()?;
    drop(out);
    beside.as_file().sync_all()?;
    beside.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Runs `forebay audit verify`.
pub(super) fn verify(args: &VerifyArgs) -> Result<(), CliError> {
    let archive = args.file.as_ref().map(|path| {
        let file = File::open(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                let message = format!("{}: no such file", path.display());
                CliError::because(Exit::NotFound, message)
            }
            _ => at(path)(error),
        })?;
        checked(path, file, |_| Ok(()))
    });
    let archive = archive.transpose()?;
    let tail = if args.offline {
        None
    } else {
        let context = args.context.resolve()?;
        let found = crate::roles::thread()?.block_on(async {
            let asked = Asked::new(context)?;
            let (tail, _) = newest(&asked).await?;
            let begins = older::begins(&asked, &tail).await;
            let end = archive.as_ref().map(|archive| &archive.end);
            // A file is compared with what comes after it, as far as that is somewhere.
            let (from, head) = match end {
                Some(end) => (end.last + 1, Some(end.head.clone())),
                None => (begins, None),
            };
            if from >= begins && from < tail.begins() {
                older::each(&asked, &tail, from, head, |_| Ok(())).await?;
            }
            Ok::<_, CliError>((tail, begins))
        });
        Some(found?)
    };
    let (first, last, head) = match (&archive, &tail) {
        (Some(archive), _) => {
            let end = &archive.end;
            (end.first, end.last, end.head.clone())
        }
        (None, Some((tail, begins))) => (*begins, tail.count, tail.head.clone()),
        // Clap lets nobody check nothing.
        (None, None) => return Err(CliError::usage("--offline needs a FILE")),
    };
    let compared = match (&args.file, &archive, &tail) {
        (Some(path), Some(archive), Some((tail, begins))) => {
            Some(compare(args, path, archive, tail, *begins)?)
        }
        _ => None,
    };
    let begins = tail.as_ref().map(|(_, begins)| *begins);
    if let Some(note) = begins.and_then(beginning) {
        say(&note);
    }
    let verified = Verified {
        schema_version: 1,
        whole: true,
        first,
        last,
        head,
        cluster: compared,
    };
    args.output.print(&verified, || page(&verified));
    Ok(())
}

fn compare(
    args: &VerifyArgs,
    path: &Path,
    archive: &Archive,
    tail: &Tail,
    begins: u64,
) -> Result<Compared, CliError> {
    let whose = path.display().to_string();
    let joined = tail
        .check(archive)
        .map_err(|fault| broken(&whose, &fault))?;
    let Joined {
        shared,
        linked,
        newer,
    } = joined;
    if args.complete && newer > 0 {
        let number = archive.end.last + 1;
        return Err(broken(&whose, &Fault::CutOff { number }));
    }
    Ok(Compared {
        shared,
        linked: linked || archive.end.last + 1 >= begins,
        newer,
    })
}

fn page(verified: &Verified) -> String {
    let Verified {
        first, last, head, ..
    } = verified;
    let mut text = if last < first {
        "whole    no entries\n".to_owned()
    } else {
        format!("whole    entries {first} to {last}\n")
    };
    text += &format!("head     {head}\n");
    match &verified.cluster {
        None => {}
        Some(Compared { linked: false, .. }) => {
            text += "cluster  what lies between the file's end and the oldest entry of the control nodes' files is kept nowhere: not compared\n";
        }
        Some(Compared { shared, newer, .. }) => {
            text += &format!("cluster  {shared} entries are the same, {newer} came later\n");
        }
    }
    text
}

fn checked(
    path: &Path,
    file: File,
    seen: impl FnMut(&Record) -> io::Result<()>,
) -> Result<Archive, CliError> {
    archive::read(BufReader::new(file), seen).map_err(|error| match error {
        ArchiveError::Io(error) => at(path)(error),
        ArchiveError::Fault(fault) => broken(&path.display().to_string(), &fault),
    })
}

fn at(path: &Path) -> impl Fn(io::Error) -> CliError + '_ {
    move |error| CliError::File {
        path: path.into(),
        error,
    }
}
