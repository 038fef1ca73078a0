//! From a request's body to a [`Job`]: the prompt as a hash, and how to answer.
//!
//! The text of the prompt ends here. Fields that do not change what this engine does (sampling,
//! tools, priorities) are accepted and ignored, as engines do.

use super::error::ApiError;
use super::text::Prompt;
use serde::Deserialize;
use serde_json::value::RawValue;

/// Which of the two APIs was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Api {
    Chat,
    Completion,
    Embedding,
}

/// A request that can run.
pub(super) struct Job {
    pub(super) api: Api,
    pub(super) model: String,
    pub(super) prompt: Prompt,
    pub(super) prompt_tokens: u64,
    /// The hash of everything up to the end of each full block, under the request's salt.
    pub(super) blocks: Vec<u64>,
    /// The prompt's tokens, where somebody is to see them.
    pub(super) ids: Vec<u32>,
    /// They are part of the answer.
    pub(super) return_ids: bool,
    /// The request's isolation scope.
    pub(super) salt: String,
    pub(super) max_tokens: u64,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    /// An embedding is wanted as base64.
    pub(super) base64: bool,
}

/// What the engine can serve.
pub(super) struct Served<'a> {
    pub(super) models: &'a [String],
    pub(super) max_context_tokens: u64,
    /// Tokens of a block of the cache.
    pub(super) block_tokens: u32,
    /// Tokens are published with the cache's events.
    pub(super) keeps_ids: bool,
}

impl Served<'_> {
    /// Checks a body.
    pub(super) fn job(&self, api: Api, body: &[u8]) -> Result<Job, ApiError> {
        let raw: Raw<'_> = serde_json::from_slice(body).map_err(|error| {
            // serde's message may quote the body: only the place and the kind are told.
            let (line, column) = (error.line(), error.column());
            let kind = if error.is_data() {
                "a field is not what it should be"
            } else {
                "not JSON"
            };
            ApiError::bad(
                None,
                format!("{kind}, at line {line} column {column} of the body"),
            )
        })?;
        let model = self.model(raw.model)?;
        let salt = raw.cache_salt.unwrap_or_default();
        let return_ids = raw.return_token_ids.unwrap_or(false);
        let mut read = Reader::new(&salt, self.block_tokens);
        if return_ids || self.keeps_ids {
            read.content = Some(Vec::new());
        }
        match api {
            Api::Chat => {
                read.chat(raw.messages, raw.continue_final_message.unwrap_or(false))?;
            }
            Api::Completion => read.completion(raw.prompt)?,
            Api::Embedding => read.completion(raw.input)?,
        }
        let ids = read.ids();
        let Reader { prompt, blocks, .. } = read;
        let prompt_tokens = prompt.tokens();
        if raw.n.unwrap_or(1) != 1 {
            return Err(ApiError::bad(
                Some("n"),
                "this engine gives one choice: leave n at 1",
            ));
        }
        if api == Api::Embedding {
            return Ok(Job {
                api,
                model,
                prompt,
                prompt_tokens,
                blocks,
                ids,
                return_ids: false,
                salt,
                max_tokens: 1,
                stream: false,
                include_usage: false,
                base64: raw.encoding_format.as_deref() == Some("base64"),
            });
        }
        let max_tokens =
            self.max_tokens(raw.max_completion_tokens.or(raw.max_tokens), prompt_tokens)?;
        let include_usage = raw.stream_options.and_then(|options| options.include_usage);
        Ok(Job {
            api,
            model,
            prompt,
            prompt_tokens,
            blocks,
            ids,
            return_ids,
            salt,
            max_tokens,
            stream: raw.stream.unwrap_or(false),
            include_usage: include_usage.unwrap_or(false),
            base64: false,
        })
    }

    fn model(&self, asked: Option<String>) -> Result<String, ApiError> {
        match asked {
            Some(model) if self.models.contains(&model) => Ok(model),
            None if !self.models.is_empty() => Ok(self.models[0].clone()),
            _ => {
                let message = format!(
                    "The model does not exist. Valid names: {}.",
                    self.models.join(", ")
                );
                Err(ApiError {
                    status: 404,
                    message,
                    param: Some("model"),
                })
            }
        }
    }

    fn max_tokens(&self, asked: Option<u64>, prompt_tokens: u64) -> Result<u64, ApiError> {
        let max_tokens = asked.unwrap_or(DEFAULT_MAX_TOKENS);
        if max_tokens == 0 {
            return Err(ApiError::bad(
                Some("max_tokens"),
                "max_tokens must be at least 1",
            ));
        }
        let most = self.max_context_tokens;
        if prompt_tokens.saturating_add(max_tokens) > most {
            let message = format!(
                "This model's maximum context length is {most} tokens. However, you requested \
                 {max_tokens} output tokens and your prompt contains {prompt_tokens} input tokens. \
                 Please reduce the length of the input prompt or the number of requested output \
                 tokens."
            );
            return Err(ApiError::bad(Some("messages"), message));
        }
        Ok(max_tokens)
    }
}

#[derive(Deserialize)]
struct Raw<'a> {
    model: Option<String>,
    #[serde(borrow)]
    messages: Option<Vec<RawMessage<'a>>>,
    #[serde(borrow)]
    prompt: Option<RawPrompt<'a>>,
    #[serde(borrow)]
    input: Option<RawPrompt<'a>>,
    cache_salt: Option<String>,
    return_token_ids: Option<bool>,
    encoding_format: Option<String>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    stream: Option<bool>,
    stream_options: Option<RawStreamOptions>,
    continue_final_message: Option<bool>,
    n: Option<u64>,
}

#[derive(Deserialize)]
struct RawStreamOptions {
    include_usage: Option<bool>,
}

#[derive(Deserialize)]
struct RawMessage<'a> {
    role: String,
    #[serde(borrow)]
    content: Option<RawContent<'a>>,
    #[serde(borrow)]
    tool_calls: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawContent<'a> {
    #[serde(borrow)]
    Borrowed(&'a str),
    Owned(String),
    Parts(Vec<RawPart>),
}

#[derive(Deserialize)]
struct RawPart {
    text: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawPrompt<'a> {
    #[serde(borrow)]
    Borrowed(&'a str),
    Owned(String),
    Ids(Vec<u32>),
}

/// Reads a prompt: its text's state, and under its salt the hash of each full block.
struct Reader {
    prompt: Prompt,
    salted: Prompt,
    block_bytes: u64,
    blocks: Vec<u64>,
    /// All that was said, where its tokens are to be seen.
    content: Option<Vec<u8>>,
}

impl Reader {
    fn new(salt: &str, block_tokens: u32) -> Reader {
        Reader {
            prompt: Prompt::empty(),
            salted: Prompt::salted(salt),
            block_bytes: u64::from(block_tokens) * BYTES_PER_TOKEN,
            blocks: Vec::new(),
            content: None,
        }
    }

    /// Four bytes of content each; behind the last there are zeros.
    fn ids(&self) -> Vec<u32> {
        let content = self.content.as_deref().unwrap_or_default();
        let id = |bytes: &[u8]| {
            let mut four = [0; BYTES_PER_TOKEN as usize];
            four[..bytes.len()].copy_from_slice(bytes);
            u32::from_le_bytes(four)
        };
        content.chunks(BYTES_PER_TOKEN as usize).map(id).collect()
    }

    fn begin_message(&mut self, role: &str) {
        self.prompt.begin_message(role);
        self.salted.begin_message(role);
    }

    fn say(&mut self, mut content: &[u8]) {
        self.prompt.say(content);
        if let Some(kept) = &mut self.content {
            kept.extend_from_slice(content);
        }
        loop {
            let missing = self.block_bytes - self.salted.bytes() % self.block_bytes;
            if (content.len() as u64) < missing {
                return self.salted.say(content);
            }
            let (block, rest) = content.split_at(usize::try_from(missing).unwrap_or(usize::MAX));
            self.salted.say(block);
            self.blocks.push(self.salted.hash());
            content = rest;
        }
    }

    fn chat(
        &mut self,
        messages: Option<Vec<RawMessage<'_>>>,
        continues: bool,
    ) -> Result<(), ApiError> {
        let messages = messages.unwrap_or_default();
        if messages.is_empty() {
            return Err(ApiError::bad(
                Some("messages"),
                "messages is missing or empty",
            ));
        }
        for message in messages {
            self.begin_message(&message.role);
            match message.content {
                None => {}
                Some(RawContent::Borrowed(text)) => self.say(text.as_bytes()),
                Some(RawContent::Owned(text)) => self.say(text.as_bytes()),
                Some(RawContent::Parts(parts)) => {
                    parts.iter().for_each(|part| self.say(part.text.as_bytes()));
                }
            }
            if let Some(calls) = message.tool_calls {
                self.say(calls.get().as_bytes());
            }
        }
        if !continues {
            self.begin_message("assistant");
        }
        Ok(())
    }

    fn completion(&mut self, prompt: Option<RawPrompt<'_>>) -> Result<(), ApiError> {
        match prompt {
            None => Err(ApiError::bad(Some("prompt"), "prompt is missing")),
            Some(RawPrompt::Borrowed(text)) => {
                self.say(text.as_bytes());
                Ok(())
            }
            Some(RawPrompt::Owned(text)) => {
                self.say(text.as_bytes());
                Ok(())
            }
            Some(RawPrompt::Ids(ids)) => {
                ids.iter().for_each(|id| self.say(&id.to_le_bytes()));
                Ok(())
            }
        }
    }
}

const BYTES_PER_TOKEN: u64 = 4;
const DEFAULT_MAX_TOKENS: u64 = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn job(api: Api, body: &str) -> Result<Job, ApiError> {
        let models = ["m".to_owned(), "m2".to_owned()];
        Served {
            models: &models,
            max_context_tokens: 100,
            block_tokens: 1,
            keeps_ids: false,
        }
        .job(api, body.as_bytes())
    }

    #[track_caller]
    fn check(api: Api, body: &str, expected: &str) {
        let got = match job(api, body) {
            Ok(job) => format!(
                "{} in {} out {} stream {} usage {}",
                job.model, job.prompt_tokens, job.max_tokens, job.stream, job.include_usage
            ),
            Err(error) => format!("{error} param {:?}", error.param),
        };
        assert!(
            got.contains(expected),
            "{body}: got {got:?}, expected {expected:?}"
        );
    }

    #[test]
    fn a_chat_is_understood() {
        use Api::Chat;
        let chat =
            |rest: &str| format!(r#"{{"messages":[{{"role":"user","content":"hello"}}]{rest}}}"#);
        check(Chat, &chat(""), "m in 2 out 16 stream false usage false");
        check(
            Chat,
            &chat(r#","model":"m2","max_tokens":3"#),
            "m2 in 2 out 3",
        );
        check(
            Chat,
            &chat(r#","max_completion_tokens":4,"max_tokens":3"#),
            "out 4",
        );
        check(
            Chat,
            &chat(r#","stream":true,"stream_options":{"include_usage":true}"#),
            "true usage true",
        );
        check(
            Chat,
            &chat(r#","stream_options":null,"temperature":0,"x":[1]"#),
            "m in 2",
        );
        check(
            Chat,
            &chat(r#","model":"other""#),
            "404: The model does not exist. Valid names: m, m2.",
        );
        check(
            Chat,
            &chat(r#","max_tokens":99"#),
            "400: This model's maximum context length is 100",
        );
        check(
            Chat,
            &chat(r#","max_tokens":18446744073709551615"#),
            "maximum context length",
        );
        check(Chat, &chat(r#","max_tokens":0"#), "400: max_tokens must");
        check(
            Chat,
            &chat(r#","max_tokens":"many""#),
            "400: a field is not",
        );
        check(
            Chat,
            &chat(r#","n":2"#),
            "400: this engine gives one choice",
        );
        check(
            Chat,
            &chat(r#","model":"m","model":"m""#),
            "400: a field is not",
        );
        check(Chat, "{not json", "400: not JSON, at line 1 column 2");
        check(Chat, "{}", "400: messages is missing");
        check(Chat, r#"{"messages":[]}"#, "400: messages is missing");
    }

    #[test]
    fn content_is_the_same_however_it_is_written() {
        let plain = job(
            Api::Chat,
            r#"{"messages":[{"role":"user","content":"a\"b"}]}"#,
        );
        let parts = r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"\u0022b"}]}]}"#;
        let parts = job(Api::Chat, parts);
        let prompt = Prompt::chat([("user", "a\"b")]);
        assert!(plain.is_ok_and(|job| job.prompt == prompt));
        assert!(parts.is_ok_and(|job| job.prompt == prompt));
    }

    #[test]
    fn a_continued_chat_goes_on_where_it_stopped() {
        let start = Prompt::chat([("user", "hi")]);
        let tokens: Vec<_> = start.answer().take(6).collect();
        let said: String = tokens[..3].iter().map(|token| token.as_str()).collect();
        let body = format!(
            r#"{{"messages":[{{"role":"user","content":"hi"}},{{"role":"assistant","content":"{said}"}}],
            "continue_final_message":true,"add_generation_prompt":false}}"#
        );
        let Ok(job) = job(Api::Chat, &body) else {
            panic!("refused")
        };
        assert!(job.prompt.answer().take(3).eq(tokens[3..].iter().copied()));
    }

    #[test]
    fn a_completion_takes_text_or_ids() {
        use Api::Completion;
        check(
            Completion,
            r#"{"prompt":"The cache block"}"#,
            "m in 4 out 16",
        );
        check(Completion, r#"{"prompt":"\n"}"#, "m in 1 out 16");
        check(
            Completion,
            r#"{"prompt":[1,2,3],"max_tokens":5}"#,
            "m in 3 out 5",
        );
        check(Completion, r#"{"prompt":["a","b"]}"#, "400: a field is not");
        check(Completion, r#"{"messages":[]}"#, "400: prompt is missing");
    }

    #[test]
    fn blocks_are_shared_up_to_where_prompts_differ_and_only_under_one_salt() {
        let blocks = |body: &str| job(Api::Chat, body).ok().unwrap().blocks;
        let chat = |text: &str, salt: &str| {
            blocks(&format!(
                r#"{{"cache_salt":"{salt}","messages":[{{"role":"user","content":"{text}"}}]}}"#
            ))
        };
        let one = chat("aaaabbbbccccd", "s");
        assert_eq!(one.len(), 3);
        assert_eq!(chat("aaaabbbbXccc", "s")[..2], one[..2]);
        assert_ne!(chat("aaaabbbbXccc", "s")[2], one[2]);
        assert_ne!(chat("aaaabbbbcccc", "t")[0], one[0]);
        let two = r#"{"cache_salt":"s","messages":[{"role":"user","content":"aa"},{"role":"user","content":"aabb"}]}"#;
        assert_ne!(blocks(two)[0], one[0], "structure counts");
    }

    proptest! {
        #[test]
        fn no_body_panics(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let served = Served { models: &[], max_context_tokens: 100, block_tokens: 4, keeps_ids: true };
            let _ = served.job(Api::Chat, &body);
            let _ = served.job(Api::Completion, &body);
        }
    }
}
