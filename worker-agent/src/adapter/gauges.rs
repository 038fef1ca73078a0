//! The few figures of an engine's metrics page that an agent uses.
//!
//! A page is read line by line, and all but the names below is passed over: vLLM's has 60 KB. Where an
//! engine has several series of a name (data-parallel ranks), they are added up.

/// Longer lines are none of ours.
const MAX_LINE_BYTES: usize = 4 << 10;
/// Longer pages are read so far.
const MAX_PAGE_BYTES: usize = 1 << 20;
const MAX_START_BYTES: usize = 64;

/// What a page said. Absent is not zero.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Gauges {
    /// Since when the process runs, as it says it: vLLM does, and SGLang with `--enable-metrics`; llama.cpp
    /// does not, nor does a vLLM with several API servers.
    pub(crate) started: Option<String>,
    /// Requests that run.
    pub(crate) running: Option<u64>,
    /// Requests that wait in the engine.
    pub(crate) waiting: Option<u64>,
    /// Share of the cache that live requests hold, 0 to 1; the most of all ranks.
    pub(crate) kv_usage: Option<f64>,
    /// Tokens that the cache holds.
    pub(crate) kv_tokens: Option<u64>,
    /// Tokens of one block of it.
    pub(crate) block_tokens: Option<u64>,
    /// Whether prefixes are cached at all.
    pub(crate) prefix_caching: Option<bool>,
    /// Counts up with the engine's work: prompt tokens and tokens of answers.
    pub(crate) work: Option<u64>,
}

impl Gauges {
    /// Reads a page.
    pub(crate) fn read(page: &[u8]) -> Self {
        let mut gauges = Self::default();
        let page = &page[..page.len().min(MAX_PAGE_BYTES)];
        for line in page.split(|byte| *byte == b'\n') {
            if line.len() <= MAX_LINE_BYTES
                && !line.starts_with(b"#")
                && let Ok(line) = str::from_utf8(line)
            {
                gauges.line(line.trim_end());
            }
        }
        gauges
    }

    fn line(&mut self, line: &str) {
        let end = line.find(['{', ' ']).unwrap_or(line.len());
        let name = &line[..end];
        let Some(field) = field(name) else { return };
        // Labels may hold spaces; what follows the last one is the value.
        let Some((labels, value)) = line[end..].rsplit_once(' ') else {
            return;
        };
        match field {
            Field::Started if labels.is_empty() => self.start(value),
            Field::Started => {}
            Field::CacheConfig => self.cache_config(labels),
            Field::Running => add(&mut self.running, value),
            Field::Waiting => add(&mut self.waiting, value),
            Field::KvTokens => add(&mut self.kv_tokens, value),
            Field::BlockTokens => self.block_tokens = whole(value).or(self.block_tokens),
            Field::Work => add(&mut self.work, value),
            Field::KvUsage => {
                let share = value.parse::<f64>().ok();
                let share = share.filter(|share| (0.0..=1.0).contains(share));
                self.kv_usage = share
                    .map(|share| self.kv_usage.map_or(share, |most| most.max(share)))
                    .or(self.kv_usage);
            }
        }
    }

    fn start(&mut self, value: &str) {
        let plain = (1..=MAX_START_BYTES).contains(&value.len())
            && value.parse::<f64>().is_ok_and(|at| at > 0.0);
        if plain && self.started.is_none() {
            self.started = Some(value.to_owned());
        }
    }

    fn cache_config(&mut self, labels: &str) {
        let size = label(labels, "block_size").and_then(whole);
        self.block_tokens = size.or(self.block_tokens);
        if let Some(tokens) = label(labels, "kv_cache_size_tokens") {
            add(&mut self.kv_tokens, tokens);
        } else if let (Some(blocks), Some(size)) = (
            // Earlier versions tell the blocks only; one of them is never used.
            label(labels, "num_gpu_blocks").and_then(whole),
            size,
        ) {
            let tokens = blocks.saturating_sub(1).saturating_mul(size);
            self.kv_tokens = Some(self.kv_tokens.unwrap_or(0).saturating_add(tokens));
        }
        self.prefix_caching = match label(labels, "enable_prefix_caching") {
            Some("True") => Some(true),
            Some("False") => Some(false),
            Some(_) | None => self.prefix_caching,
        };
    }
}

enum Field {
    Started,
    CacheConfig,
    Running,
    Waiting,
    KvUsage,
    KvTokens,
    BlockTokens,
    Work,
}

fn field(name: &str) -> Option<Field> {
    Some(match name {
        "process_start_time_seconds" => Field::Started,
        "vllm:cache_config_info" => Field::CacheConfig,
        "vllm:num_requests_running"
        | "llamacpp:requests_processing"
        | "sglang:num_running_reqs" => Field::Running,
        "vllm:num_requests_waiting" | "llamacpp:requests_deferred" | "sglang:num_queue_reqs" => {
            Field::Waiting
        }
        "vllm:kv_cache_usage_perc" | "sglang:token_usage" => Field::KvUsage,
        "sglang:max_total_num_tokens" => Field::KvTokens,
        "sglang:page_size" => Field::BlockTokens,
        "vllm:prompt_tokens_total"
        | "vllm:generation_tokens_total"
        | "llamacpp:prompt_tokens_total"
        | "llamacpp:tokens_predicted_total"
        | "sglang:prompt_tokens_total"
        | "sglang:generation_tokens_total" => Field::Work,
        _ => return None,
    })
}

/// A label's value; one with escapes in it is none of ours.
fn label<'a>(labels: &'a str, name: &str) -> Option<&'a str> {
    let mut rest = labels.strip_prefix('{')?;
    loop {
        let (key, after) = rest.split_once("=\"")?;
        let (value, after) = after.split_once('"')?;
        if key == name {
            return Some(value);
        }
        rest = after.strip_prefix(',')?;
    }
}

fn add(to: &mut Option<u64>, value: &str) {
    if let Some(value) = whole(value) {
        *to = Some(to.unwrap_or(0).saturating_add(value));
    }
}

/// A number as pages write it: `3`, `3.0`, `3e9`.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it was looked at
fn whole(value: &str) -> Option<u64> {
    let number: f64 = value.parse().ok()?;
    (0.0..9e15).contains(&number).then_some(number as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn vllm_tells_its_load_its_cache_and_its_process() {
        let page = include_bytes!("../../tests/samples/vllm-metrics.txt");
        let expected = Gauges {
            started: Some("1.79537712649e+09".into()),
            running: Some(0),
            waiting: Some(0),
            kv_usage: Some(0.0),
            kv_tokens: Some(3104),
            block_tokens: Some(32),
            prefix_caching: Some(true),
            work: Some(0),
        };
        assert_eq!(Gauges::read(page), expected);
    }

    #[test]
    fn llama_tells_its_load_only() {
        let page = include_bytes!("../../tests/samples/llama-metrics.txt");
        let expected = Gauges {
            running: Some(0),
            waiting: Some(0),
            work: Some(183 + 80),
            ..Gauges::default()
        };
        assert_eq!(Gauges::read(page), expected);
    }

    #[test]
    fn sglang_tells_its_load_and_its_cache() {
        let page = include_bytes!("../../tests/samples/sglang-metrics.txt");
        let expected = Gauges {
            started: Some("1795377126.49".into()),
            running: Some(3),
            waiting: Some(1),
            kv_usage: Some(0.28),
            kv_tokens: Some(454_942),
            block_tokens: Some(1),
            prefix_caching: None,
            work: Some(8_128_902 + 7_557_572),
        };
        assert_eq!(Gauges::read(page), expected);
    }

    #[test]
    fn ranks_are_added_up() {
        let page = "vllm:num_requests_running{engine=\"0\",model_name=\"a b\"} 2.0\n\
            vllm:num_requests_running{engine=\"1\",model_name=\"a b\"} 3.0\r\n\
            vllm:kv_cache_usage_perc{engine=\"0\"} 0.5\nvllm:kv_cache_usage_perc{engine=\"1\"} 0.25\n\
            vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"11\"} 1.0\n\
            vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"11\"} 1.0\n";
        let gauges = Gauges::read(page.as_bytes());
        assert_eq!(gauges.running, Some(5));
        assert_eq!(gauges.kv_usage, Some(0.5));
        assert_eq!(
            (gauges.kv_tokens, gauges.block_tokens),
            (Some(320), Some(16))
        );
    }

    #[test]
    fn a_process_is_known_by_when_it_started() {
        let started = |page: &str| Gauges::read(page.as_bytes()).started;
        let page = "# TYPE process_start_time_seconds gauge\nx 1\nprocess_start_time_seconds 1.79537712649e+09\ny 2\n";
        assert_eq!(started(page).as_deref(), Some("1.79537712649e+09"));
        for none in [
            "",
            "process_start_time_seconds",
            "process_start_time_seconds \n",
            "process_start_time_seconds soon\n",
            "process_start_time_seconds 0\n",
            "process_start_time_seconds{pid=\"1\"} 3\n",
        ] {
            assert_eq!(started(none), None, "{none:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_pages_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Gauges::read(&bytes);
        }

        #[test]
        fn arbitrary_lines_never_panic(labels in "[{}a-z\"=, ]{0,30}", value in "[-0-9.eE+NaInf ]{0,9}") {
            for name in ["vllm:cache_config_info", "vllm:kv_cache_usage_perc", "process_start_time_seconds"] {
                let _ = Gauges::read(format!("{name}{labels} {value}").as_bytes());
            }
        }
    }
}
