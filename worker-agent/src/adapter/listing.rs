//! What an engine says of itself in `/v1/models`.

const MAX_MODELS: usize = 256;

/// An answer of `/v1/models`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listing {
    /// Names of the models, sorted.
    pub(crate) models: Vec<String>,
    /// What kind of engine answers, by who it says owns the first of them; `openai`: none that is known.
    pub(crate) kind: &'static str,
    /// The longest context of all of them that say one, in tokens.
    pub(crate) max_context_tokens: Option<u32>,
}

#[derive(serde::Deserialize)]
struct Document {
    data: Vec<Model>,
}

#[derive(serde::Deserialize)]
struct Model {
    id: String,
    #[serde(default)]
    owned_by: Option<String>,
    #[serde(default)]
    max_model_len: Option<u32>,
    #[serde(default)]
    meta: Option<Meta>,
}

/// llama.cpp's.
#[derive(serde::Deserialize)]
struct Meta {
    #[serde(default)]
    n_ctx: Option<u32>,
}

impl Listing {
    /// Reads the document.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it.
    pub(crate) fn read(document: &[u8]) -> Result<Self, &'static str> {
        let document: Document =
            serde_json::from_slice(document).map_err(|_| "/v1/models is not a list of models")?;
        let owner = document.data.first();
        let owner = owner.and_then(|model| model.owned_by.as_deref());
        let kind = match owner {
            Some("vllm") => "vllm",
            Some("sglang") => "sglang",
            Some("llamacpp") => "llama.cpp",
            Some("forebay-emulated") => "emulated",
            Some(_) | None => "openai",
        };
        let context = |model: &Model| {
            let meta = model.meta.as_ref().and_then(|meta| meta.n_ctx);
            model.max_model_len.or(meta)
        };
        let max_context_tokens = document.data.iter().filter_map(context).max();
        let mut models: Vec<_> = document.data.into_iter().map(|model| model.id).collect();
        models.sort_unstable();
        models.dedup();
        match models.len() {
            0 => Err("/v1/models names no model"),
            1..=MAX_MODELS => Ok(Self {
                models,
                kind,
                max_context_tokens,
            }),
            _ => Err("/v1/models names more than 256 models"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(document: &str, models: &[&str], kind: &str, context: Option<u32>) {
        let listing = Listing::read(document.as_bytes()).unwrap();
        assert_eq!(listing.models, models);
        assert_eq!((listing.kind, listing.max_context_tokens), (kind, context));
    }

    #[test]
    fn an_engine_is_known_by_who_owns_its_models() {
        let vllm = include_str!("../../tests/samples/vllm-models.json");
        check(vllm, &["tiny"], "vllm", Some(2048));
        let llama = include_str!("../../tests/samples/llama-models.json");
        check(llama, &["tiny/tiny.gguf"], "llama.cpp", Some(2048));
        let sglang = include_str!("../../tests/samples/sglang-models.json");
        check(sglang, &["tiny"], "sglang", Some(16384));
        check(
            r#"{"data":[{"id":"m","owned_by":"forebay-emulated","max_model_len":9}]}"#,
            &["m"],
            "emulated",
            Some(9),
        );
    }

    #[test]
    fn models_are_named_once_and_sorted() {
        let list =
            r#"{"object":"list","data":[{"id":"b","x":1},{"id":"a","owned_by":null},{"id":"b"}]}"#;
        check(list, &["a", "b"], "openai", None);
        assert!(Listing::read(br#"{"data":[]}"#).is_err());
        assert!(Listing::read(b"<html>").is_err());
    }
}
