//! Keyed fingerprints of a prompt: what routing knows of it, without a tokenizer.
//!
//! A prompt's **canonical form** is its prompt-bearing fields as bytes, without lengths or counts:
//! content is UTF-8 and tags begin with a byte that UTF-8 cannot contain, so different prompts never
//! share a form, a longer conversation's form extends the shorter one's, and two prompts that agree
//! in their first bytes have forms that agree up to there. What engines' renderers ignore (escapes,
//! whitespace, key order of messages, ids, echo fields of SDKs) is ignored. The form is cut into
//! **chunks**, and each full chunk's keyed, chained hash is published.
//!
//! The form's bytes exist a chunk at a time, inside this module; nothing of the text leaves it. A
//! body is expected to be JSON that was checked already; what is not is found where it is read.
//!
//! | bytes | stand before |
//! |---|---|
//! | `FF 01` | a tool |
//! | `FF 02` | the text of a completion |
//! | `FF 10`, `FE` | a message's role, its content |
//! | `FF 11`, `FF 13` | its name, its reasoning |
//! | `FF 20`, `FF 21` | a tool call's name, its arguments |
//! | `FF 30` | the hash of an image, a sound or a file |
//! | `FD`, `FC` | a string inside JSON values, and behind it |

mod chain;
mod form;
mod profile;

use std::hash::Hasher as _;

use forebay_proto::FingerprintKey;

pub use crate::json::Unreadable;
use crate::json::{Kind, Scanner, Span, says, unescape};
use chain::{Chain, finish, keyed, published};
use form::Form;
pub use profile::{LateSystem, RenderProfile, ToolsOrder};

/// What kind of prompt a body has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

/// What two prompts have to agree in before any chunk of them is the same.
#[derive(Clone, Copy, Debug)]
pub struct Root<'a> {
    /// The pool.
    pub pool: &'a str,
    /// The model as it is served.
    pub model: &'a str,
    /// The adapter and its revision, if one is asked for.
    pub adapter: Option<&'a str>,
    /// Who may share prefixes: the tenant, as a rule.
    pub scope: &'a str,
}

/// How a body is read.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    /// What the chunks are chained with.
    pub key: &'a FingerprintKey,
    /// What the chain begins with.
    pub root: Root<'a>,
    /// What the pool's template does.
    pub profile: &'a RenderProfile,
    /// Bytes of one chunk; at least 16.
    pub chunk_bytes: u32,
}

/// What is known of a prompt. Fingerprints only: nothing here tells the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// The fingerprint of each full chunk of the first MiB, in order.
    pub chunks: Vec<u64>,
    /// Canonical bytes in all.
    pub bytes: u64,
    /// Keyed hash of the first 100 bytes of content.
    pub head: u64,
    /// Keyed hash of the client's `prompt_cache_key`, or else of its `session_id`.
    pub affinity: Option<u64>,
    /// The isolation scope as the engine gets it.
    pub salt: String,
}

/// Reads a prompt.
///
/// # Errors
///
/// Returns why it has no fingerprint.
pub fn read(
    endpoint: Endpoint,
    body: &[u8],
    settings: &Settings<'_>,
) -> Result<Prompt, Unreadable> {
    std::str::from_utf8(body).map_err(|_| Unreadable::NotUtf8)?;
    let fields = Fields::find(body)?;
    let key = settings.key;
    let narrowed = fields.text(body, fields.cache_salt)?;
    let scope = scope(settings.root.scope, narrowed.as_deref());
    let salt = engine_salt(key, &scope);
    let by = fields.prompt_cache_key.or(fields.session_id);
    let affinity = fields.text(body, by)?.map(|by| {
        let mut hasher = keyed(key);
        hasher.write(b"affinity");
        hasher.write(scope.as_bytes());
        hasher.write(&[0xff]);
        hasher.write(by.as_bytes());
        published(finish(&hasher))
    });
    let chunk_bytes = settings.chunk_bytes.max(16) as usize;
    let ids = endpoint == Endpoint::Completions && fields.is_ids(body)?;
    let root = fields.root(body, settings, &scope, ids)?;
    let mut chain = Chain::new(*key, root, chunk_bytes, body.len());
    // A template of the request's own renders who knows what.
    if fields.chat_template.is_none() {
        let mut form = Form {
            body,
            profile: settings.profile,
            chain: &mut chain,
        };
        match endpoint {
            Endpoint::Chat => form.chat(fields.messages, fields.tools)?,
            Endpoint::Completions => form.completion(fields.prompt)?,
        }
    }
    Ok(Prompt {
        bytes: chain.bytes,
        head: chain.head(),
        chunks: chain.chunks,
        affinity,
        salt,
    })
}

/// The isolation scope of a tenant, narrowed by a client's own salt: never widened, and two tenants
/// with the same salt share nothing.
#[must_use]
pub fn scope(tenant: &str, client_salt: Option<&str>) -> String {
    match client_salt {
        Some(salt) => format!("{tenant}\0{salt}"),
        None => tenant.to_owned(),
    }
}

/// A scope as engines get it, in 32 hexadecimal digits.
#[must_use]
pub fn engine_salt(key: &FingerprintKey, scope: &str) -> String {
    let mut hasher = keyed(key);
    hasher.write(b"salt");
    hasher.write(scope.as_bytes());
    finish(&hasher)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The top-level members that matter; of a key that appears twice, the last.
#[derive(Default)]
struct Fields {
    messages: Option<Span>,
    tools: Option<Span>,
    prompt: Option<Span>,
    suffix: Option<Span>,
    cache_salt: Option<Span>,
    prompt_cache_key: Option<Span>,
    session_id: Option<Span>,
    chat_template: Option<Span>,
    chat_template_kwargs: Option<Span>,
    reasoning_effort: Option<Span>,
    tool_choice: Option<Span>,
    documents: Option<Span>,
}

impl Fields {
    fn find(body: &[u8]) -> Result<Self, Unreadable> {
        let mut fields = Self::default();
        let mut scanner = Scanner::new(body);
        scanner.object(|key, value| {
            let raw = &body[key.from..key.to];
            let null = value.kind()? == Kind::Null;
            let span = value.skip()?;
            if let Some(field) = fields.named(raw) {
                *field = (!null).then_some(span);
            }
            Ok(())
        })?;
        scanner.end()?;
        Ok(fields)
    }

    fn named(&mut self, raw: &[u8]) -> Option<&mut Option<Span>> {
        let named = [
            ("messages", &mut self.messages),
            ("tools", &mut self.tools),
            ("prompt", &mut self.prompt),
            ("suffix", &mut self.suffix),
            ("cache_salt", &mut self.cache_salt),
            ("prompt_cache_key", &mut self.prompt_cache_key),
            ("session_id", &mut self.session_id),
            ("chat_template", &mut self.chat_template),
            ("chat_template_kwargs", &mut self.chat_template_kwargs),
            ("reasoning_effort", &mut self.reasoning_effort),
            ("tool_choice", &mut self.tool_choice),
            ("documents", &mut self.documents),
        ];
        let mut named = named.into_iter();
        named
            .find(|(name, _)| says(raw, name.as_bytes()))
            .map(|(_, field)| field)
    }

    /// A field's text; none where it is no string.
    fn text(&self, body: &[u8], field: Option<Span>) -> Result<Option<String>, Unreadable> {
        let Some(span) = field else { return Ok(None) };
        let mut scanner = Scanner::within(body, span);
        if scanner.kind()? != Kind::String {
            return Ok(None);
        }
        let raw = scanner.string()?;
        let mut text = Vec::new();
        unescape(&body[raw.from..raw.to], |piece| {
            text.extend_from_slice(piece);
        })?;
        String::from_utf8(text)
            .map(Some)
            .map_err(|_| Unreadable::NotUtf8)
    }

    /// Whether a completion's prompt is given as token ids.
    fn is_ids(&self, body: &[u8]) -> Result<bool, Unreadable> {
        let Some(span) = self.prompt else {
            return Ok(false);
        };
        let mut scanner = Scanner::within(body, span);
        if scanner.kind()? != Kind::Array {
            return Ok(false);
        }
        let mut ids = None;
        scanner.array(|item| {
            let kind = item.kind()?;
            let first = ids.is_none();
            let span = item.skip()?;
            if first {
                ids = Some(match kind {
                    Kind::Number => true,
                    // A batch of prompts in ids.
                    Kind::Array => {
                        let mut number = false;
                        Scanner::within(body, span).array(|id| {
                            number |= id.kind()? == Kind::Number;
                            id.skip().map(drop)
                        })?;
                        number
                    }
                    _ => false,
                });
            }
            Ok(())
        })?;
        Ok(ids == Some(true))
    }

    /// Where the chain begins: everything that changes the rendered prompt as a whole.
    fn root(
        &self,
        body: &[u8],
        settings: &Settings<'_>,
        scope: &str,
        ids: bool,
    ) -> Result<[u8; 16], Unreadable> {
        let Root {
            pool,
            model,
            adapter,
            scope: _,
        } = settings.root;
        let mut hasher = keyed(settings.key);
        let mut part = |tag: u8, text: &[u8]| {
            hasher.write(&[0xff, tag]);
            hasher.write(text);
        };
        part(0, b"forebay/1");
        part(1, pool.as_bytes());
        part(2, settings.profile.id().as_bytes());
        part(3, model.as_bytes());
        if let Some(adapter) = adapter {
            part(4, adapter.as_bytes());
        }
        part(5, scope.as_bytes());
        if ids {
            // Here, so that chunks hold whole ids.
            part(6, &[0xff, 0x03]);
        }
        let values = [
            (7, self.chat_template_kwargs),
            (8, self.reasoning_effort),
            (9, self.documents),
            (10, self.suffix),
        ];
        for (tag, value) in values {
            if let Some(span) = value {
                let mut canonical = Vec::new();
                form::value(body, span, &mut |bytes| canonical.extend_from_slice(bytes))?;
                part(tag, &canonical);
            }
        }
        let choice = self.text(body, self.tool_choice)?;
        if choice.as_deref() == Some("none") {
            part(11, b"none");
        }
        Ok(finish(&hasher))
    }
}

#[cfg(test)]
mod tests;
