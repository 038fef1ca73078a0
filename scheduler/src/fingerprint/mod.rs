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
//! | `FF 11`, `FF 13` | its name, its reasoning, both before its content |
//! | `FF 20`, `FF 21` | a tool call's name, its arguments |
//! | `FF 30` | the hash of an image, a sound or a file |
//! | `FD`, `FC` | a string inside JSON values, and behind it |
//!
//! A prompt that is given as token ids is chained as four bytes an id, `FF 03` being part of where the chain
//! begins, so that chunks hold whole ids: 64 of them in 256 bytes.
//!
//! Where a value inside tools or arguments has a key twice, both count, though engines read the last:
//! that costs a hit and never finds a wrong one.

mod chain;
mod form;
mod outline;
mod profile;
mod rendering;
mod shape;

use std::hash::Hasher as _;

use forebay_proto::FingerprintKey;

pub use crate::json::Unreadable;
use crate::json::{Kind, Scanner, Span, says, unescape};
use crate::length::Makeup;
use chain::{Chain, finish, keyed, published};
use form::Form;
pub use outline::{Outline, outline};
pub use profile::{LateSystem, RENDER_PROFILE, Reasoning, RenderProfile, ToolsOrder};
pub use rendering::{Rendering, renderings};
use shape::Shaper;

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
    /// Bytes of one chunk; 16 to 32,768.
    pub chunk_bytes: u32,
}

/// What is known of a prompt. Fingerprints only: nothing here tells the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// The fingerprint of each full chunk of the first MiB, in order.
    pub chunks: Vec<u64>,
    /// Canonical bytes in all.
    pub bytes: u64,
    /// What these bytes are, from which follows how many tokens they make.
    pub makeup: Makeup,
    /// Keyed hash of the first 100 bytes of content.
    pub head: u64,
    /// Keyed hash of the client's `prompt_cache_key`, or else of its `session_id`.
    pub affinity: Option<u64>,
    /// The isolation scope as the engine gets it.
    pub salt: String,
    /// Keyed hash of all that an engine may die of: the whole prompt, what it stands in, and the shape.
    pub whole: u64,
    /// Which parameters it has, and of what class; no values.
    pub shape: String,
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
    let mut fields = Fields::find(body)?;
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
    let chunk_bytes = settings.chunk_bytes.clamp(16, 1 << 15) as usize;
    let batch = match endpoint {
        Endpoint::Completions => Some(Batch::find(body, fields.prompt)?),
        Endpoint::Chat => None,
    };
    let ids = matches!(
        batch,
        Some(Batch {
            first: First::Ids(_),
            ..
        })
    );
    let root = fields.root(body, settings, &scope, ids)?;
    let mut chain = Chain::new(*key, root, chunk_bytes, body.len());
    // A template of the request's own renders who knows what.
    if fields.chat_template.is_none() {
        let mut form = Form {
            body,
            profile: settings.profile,
            chain: &mut chain,
        };
        match &batch {
            None => form.chat(fields.messages, fields.tools)?,
            Some(batch) => form.completion(&batch.first)?,
        }
    }
    let shape = std::mem::take(&mut fields.shaper).finish();
    // Several prompts in one, or a template of its own: the bytes are all that is known.
    let opaque =
        fields.chat_template.is_some() || matches!(&batch, Some(batch) if batch.prompts > 1);
    let whole = if opaque {
        raw(body, settings, &shape)
    } else {
        chain.whole(&shape)
    };
    let makeup = chain.makeup();
    let mut prompt = Prompt {
        bytes: chain.bytes,
        makeup,
        head: chain.head(),
        chunks: chain.chunks,
        affinity,
        salt,
        whole,
        shape,
    };
    if ids {
        prompt.makeup.given_in_ids(prompt.bytes / 4);
    }
    if let Some(batch) = batch.filter(|batch| batch.prompts > 1) {
        batch.enlarge(body, &mut prompt)?;
    }
    Ok(prompt)
}

/// The prompts of a completion. Nobody counts the tokens of one of several, so that only the first has
/// a fingerprint, which serves to tell batches apart: they are placed by their size.
struct Batch {
    first: First,
    /// All of them.
    whole: Span,
    prompts: u64,
}

/// The first prompt.
enum First {
    Text(Span),
    /// An array of token ids.
    Ids(Span),
}

impl Batch {
    fn find(body: &[u8], prompt: Option<Span>) -> Result<Self, Unreadable> {
        let whole = prompt.ok_or(Unreadable::Malformed)?;
        let mut scanner = Scanner::within(body, whole);
        let one = |first| Self {
            first,
            whole,
            prompts: 1,
        };
        match scanner.kind()? {
            Kind::String => return Ok(one(First::Text(whole))),
            Kind::Array => {}
            _ => return Err(Unreadable::Malformed),
        }
        let (mut first, mut prompts) = (None, 0);
        scanner.array(|item| {
            let kind = item.kind()?;
            let span = item.skip()?;
            prompts += 1;
            first.get_or_insert((kind, span));
            Ok(())
        })?;
        Ok(match first {
            None | Some((Kind::Number, _)) => one(First::Ids(whole)),
            Some((Kind::String, span)) => Self {
                first: First::Text(span),
                whole,
                prompts,
            },
            Some((Kind::Array, span)) => Self {
                first: First::Ids(span),
                whole,
                prompts,
            },
            Some(_) => return Err(Unreadable::Malformed),
        })
    }

    /// Counts the other prompts too.
    fn enlarge(&self, body: &[u8], prompt: &mut Prompt) -> Result<(), Unreadable> {
        prompt.affinity = prompt.affinity.or(prompt.chunks.last().copied());
        prompt.chunks.clear();
        prompt.makeup.without_chunks();
        let (mut first, mut ids) = (true, prompt.bytes / 4);
        Scanner::within(body, self.whole).array(|item| {
            if std::mem::take(&mut first) {
                return item.skip().map(drop);
            }
            match (&self.first, item.kind()?) {
                (First::Text(_), Kind::String) => {
                    let raw = item.string()?;
                    unescape(&body[raw.from..raw.to], |piece| {
                        prompt.bytes += piece.len() as u64;
                        prompt.makeup.rest().count(piece);
                    })
                }
                (First::Ids(_), Kind::Array) => item.array(|id| {
                    ids += 1;
                    prompt.bytes += 4;
                    id.skip().map(drop)
                }),
                _ => Err(Unreadable::Malformed),
            }
        })?;
        if let First::Ids(_) = self.first {
            prompt.makeup.given_in_ids(ids);
        }
        Ok(())
    }
}

/// What names a request whose prompt cannot be read, in place of [`Prompt::whole`]: its bytes as they stand.
#[must_use]
pub fn raw(body: &[u8], settings: &Settings<'_>, shape: &str) -> u64 {
    let mut hasher = keyed(settings.key);
    hasher.write(b"raw");
    for part in [
        settings.root.pool,
        settings.root.model,
        settings.root.scope,
        shape,
    ] {
        hasher.write(part.as_bytes());
        hasher.write(&[0xff]);
    }
    hasher.write(body);
    named(finish(&hasher))
}

/// Zero names nobody.
fn named(state: [u8; 16]) -> u64 {
    published(state).max(1)
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
    shaper: Shaper,
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
            if !null {
                fields.shaper.take(body, raw, span)?;
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
