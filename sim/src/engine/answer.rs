//! What an answer looks like on the wire: vLLM's JSON and server-sent events.

use super::request::{Api, Job};
use super::text::Token;
use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use serde_json::json;

/// The parts of an answer that do not change from token to token.
pub(super) struct Form {
    api: Api,
    id: String,
    created: u64,
    model: String,
    prompt_tokens: u64,
    /// The prompt's tokens, where they are asked for.
    ids: Option<Vec<u32>>,
    /// A stream's event up to the token's text, and after it.
    before: String,
    after: String,
    after_last: String,
}

impl Form {
    /// `id` is the request's; `created` is in seconds since 1970.
    pub(super) fn new(job: &Job, id: &str, created: u64) -> Form {
        let prefix = match job.api {
            Api::Chat => "chatcmpl-",
            Api::Completion | Api::Embedding => "cmpl-",
        };
        let id = format!("{prefix}{id}");
        let object = match job.api {
            Api::Chat => "chat.completion.chunk",
            Api::Completion | Api::Embedding => "text_completion",
        };
        let (id_json, model_json) = (json!(id), json!(job.model));
        let head = format!(
            r#"data: {{"id":{id_json},"object":"{object}","created":{created},"model":{model_json},"choices":[{{"index":0,"#
        );
        let (opens, closes) = match job.api {
            Api::Chat => (r#""delta":{"content":""#, r#""}"#),
            Api::Completion | Api::Embedding => (r#""text":""#, r#"""#),
        };
        let end = |finish: &str| {
            format!(
                "{closes},\"logprobs\":null,\"finish_reason\":{finish},\"stop_reason\":null}}]}}\n\n"
            )
        };
        Form {
            api: job.api,
            id,
            created,
            model: job.model.clone(),
            prompt_tokens: job.prompt_tokens,
            ids: job.return_ids.then(|| job.ids.clone()),
            before: format!("{head}{opens}"),
            after: end("null"),
            after_last: end("\"length\""),
        }
    }

    /// The event before the first token, which only chats have.
    pub(super) fn role_event(&self) -> Option<Bytes> {
        let mut event = match (self.api, &self.ids) {
            (Api::Chat, _) => json!({
                "id": self.id, "object": "chat.completion.chunk", "created": self.created,
                "model": self.model,
                "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""},
                    "logprobs": null, "finish_reason": null}],
            }),
            // vLLM has them beside the first token.
            (Api::Completion | Api::Embedding, Some(ids)) => json!({
                "id": self.id, "object": "text_completion", "created": self.created,
                "model": self.model,
                "choices": [{"index": 0, "text": "", "logprobs": null, "finish_reason": null,
                    "prompt_token_ids": ids, "token_ids": []}],
            }),
            (Api::Completion | Api::Embedding, None) => return None,
        };
        if let (Api::Chat, Some(ids)) = (self.api, &self.ids) {
            event["prompt_token_ids"] = json!(ids);
        }
        Some(Bytes::from(format!("data: {event}\n\n")))
    }

    /// The event of one token.
    pub(super) fn token_event(&self, token: Token, last: bool, into: &mut BytesMut) {
        let after = if last { &self.after_last } else { &self.after };
        for part in [self.before.as_str(), token.as_str(), after] {
            into.extend_from_slice(part.as_bytes());
        }
    }

    /// The event with the token counts, which the client has to ask for.
    pub(super) fn usage_event(&self, output_tokens: u64, cached_tokens: u32) -> Bytes {
        let object = match self.api {
            Api::Chat => "chat.completion.chunk",
            Api::Completion | Api::Embedding => "text_completion",
        };
        let event = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "choices": [], "usage": self.usage(output_tokens, cached_tokens),
            "system_fingerprint": FINGERPRINT,
        });
        Bytes::from(format!("data: {event}\n\n"))
    }

    /// A whole answer in one piece.
    pub(super) fn whole(&self, text: &str, output_tokens: u64, cached_tokens: u32) -> Bytes {
        let choice = match self.api {
            Api::Chat => json!({
                "index": 0, "message": {"role": "assistant", "content": text, "refusal": null},
                "logprobs": null, "finish_reason": "length", "stop_reason": null,
            }),
            Api::Completion | Api::Embedding => json!({
                "index": 0, "text": text, "logprobs": null, "finish_reason": "length",
                "stop_reason": null,
            }),
        };
        let object = match self.api {
            Api::Chat => "chat.completion",
            Api::Completion | Api::Embedding => "text_completion",
        };
        let mut choice = choice;
        let mut answer = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "service_tier": null, "system_fingerprint": FINGERPRINT,
            "usage": self.usage(output_tokens, cached_tokens),
        });
        if let Some(ids) = &self.ids {
            let said = text.as_bytes().as_chunks::<4>().0.iter();
            let said: Vec<u32> = said.map(|token| u32::from_le_bytes(*token)).collect();
            choice["token_ids"] = json!(said);
            let place = match self.api {
                Api::Chat => &mut answer,
                Api::Completion | Api::Embedding => &mut choice,
            };
            place["prompt_token_ids"] = json!(ids);
        }
        answer["choices"] = json!([choice]);
        Bytes::from(answer.to_string())
    }

    fn usage(&self, output_tokens: u64, cached_tokens: u32) -> serde_json::Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + output_tokens,
            "completion_tokens": output_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        })
    }
}

/// A vector that follows from the text alone, as floats or as the base64 of their bytes.
pub(super) fn embedding(job: &Job) -> Bytes {
    let mut state = job.prompt.hash();
    let vector: Vec<f32> = (0..EMBEDDING_LENGTH)
        .map(|_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    let vector = if job.base64 {
        let bytes: Vec<u8> = vector
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        json!(base64::engine::general_purpose::STANDARD.encode(bytes))
    } else {
        json!(vector)
    };
    let tokens = job.prompt_tokens;
    let answer = json!({
        "object": "list", "model": job.model,
        "data": [{"object": "embedding", "index": 0, "embedding": vector}],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    });
    Bytes::from(answer.to_string())
}

const EMBEDDING_LENGTH: usize = 16;

/// The last event of a stream.
pub(super) const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

const FINGERPRINT: &str = concat!("forebay-emulated-", env!("CARGO_PKG_VERSION"));

#[cfg(test)]
mod tests {
    use super::super::request::Served;
    use super::*;

    fn form(api: Api, body: &str) -> (Form, Job) {
        let models = ["a \"b\"".to_owned()];
        let served = Served {
            models: &models,
            max_context_tokens: 100,
            block_tokens: 16,
            keeps_ids: false,
        };
        let Ok(job) = served.job(api, body.as_bytes()) else {
            panic!("refused")
        };
        (Form::new(&job, "r1", 7), job)
    }

    fn event(bytes: &Bytes) -> serde_json::Value {
        let text = std::str::from_utf8(bytes).unwrap();
        let data = text
            .strip_prefix("data: ")
            .unwrap()
            .strip_suffix("\n\n")
            .unwrap();
        serde_json::from_str(data).unwrap()
    }

    #[test]
    fn a_chat_streams_role_tokens_and_usage() {
        let (form, job) = form(
            Api::Chat,
            r#"{"messages":[{"role":"user","content":"hello"}]}"#,
        );
        let role = event(&form.role_event().unwrap());
        assert_eq!(role["choices"][0]["delta"]["role"], "assistant");
        let token = job.prompt.answer().next().unwrap();
        let token_event = |token, last| {
            let mut piece = BytesMut::new();
            form.token_event(token, last, &mut piece);
            event(&piece.freeze())
        };
        let middle = token_event(token, false);
        assert_eq!(middle["id"], "chatcmpl-r1");
        assert_eq!(middle["model"], "a \"b\"");
        assert_eq!(middle["choices"][0]["delta"]["content"], token.as_str());
        assert!(middle["choices"][0]["finish_reason"].is_null());
        let last = token_event(token, true);
        assert_eq!(last["choices"][0]["finish_reason"], "length");
        let usage = event(&form.usage_event(9, 1));
        assert_eq!(usage["choices"], json!([]));
        assert_eq!(usage["usage"]["total_tokens"], 11);
        assert_eq!(usage["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
    }

    #[test]
    fn a_completion_has_text_and_no_role() {
        let (form, job) = form(Api::Completion, r#"{"prompt":"hello"}"#);
        assert!(form.role_event().is_none());
        let token = job.prompt.answer().next().unwrap();
        let mut piece = BytesMut::new();
        form.token_event(token, false, &mut piece);
        let chunk = event(&piece.freeze());
        assert_eq!(chunk["id"], "cmpl-r1");
        assert_eq!(chunk["choices"][0]["text"], token.as_str());
        let whole: serde_json::Value = serde_json::from_slice(&form.whole("x", 1, 0)).unwrap();
        assert_eq!(whole["choices"][0]["text"], "x");
        assert_eq!(whole["object"], "text_completion");
    }
}
