//! The canonical form, version 1: which bytes of a body count, and in which order.

use std::hash::Hasher as _;

use base64::Engine as _;
use siphasher::sip128::SipHasher13;

use super::chain::finish;
use super::profile::{LateSystem, Reasoning, RenderProfile, ToolsOrder};
use super::{First, Unreadable};
use crate::json::{Kind, Scanner, Span, says, unescape};

const TOOL: &[u8] = &[0xff, 0x01];
const COMPLETION: &[u8] = &[0xff, 0x02];
const ROLE: &[u8] = &[0xff, 0x10];
const NAME: &[u8] = &[0xff, 0x11];
const REASONING: &[u8] = &[0xff, 0x13];
const CONTENT: &[u8] = &[0xfe];
const CALL: &[u8] = &[0xff, 0x20];
const ARGUMENTS: &[u8] = &[0xff, 0x21];
const MEDIA: &[u8] = &[0xff, 0x30];
/// Messages of one body, and members of one part of them: what is kept of each is more than a few bytes.
const MAX_MESSAGES: usize = 1 << 16;
const MAX_MEMBERS: usize = 1 << 10;
/// Types of a part whose `text` is rendered.
const TEXT_KINDS: [&[u8]; 3] = [b"text", b"input_text", b"output_text"];
const STRING: &[u8] = &[0xfd];
const STRING_END: &[u8] = &[0xfc];

/// What takes a form's bytes, in their order.
pub(super) trait Sink {
    /// Structure.
    fn tag(&mut self, bytes: &[u8]);
    /// Content.
    fn put(&mut self, bytes: &[u8]);
    /// The hash of an image, a sound or a file.
    fn medium(&mut self, tag: &[u8], hash: &[u8]);
    /// What media are hashed with.
    fn media_hasher(&self) -> SipHasher13;
}

/// Writes a body's form into a sink.
pub(super) struct Form<'a, S> {
    pub(super) body: &'a [u8],
    pub(super) profile: &'a RenderProfile,
    pub(super) chain: &'a mut S,
}

/// The members of a message that are rendered.
#[derive(Clone, Copy, Default)]
struct Message {
    role: Option<Span>,
    content: Option<Span>,
    name: Option<Span>,
    reasoning: Option<Span>,
    calls: Option<Span>,
}

impl<S: Sink> Form<'_, S> {
    pub(super) fn completion(&mut self, first: &First) -> Result<(), Unreadable> {
        match first {
            First::Text(first) => {
                self.chain.tag(COMPLETION);
                self.string(*first)
            }
            First::Ids(ids) => {
                let body = self.body;
                Scanner::within(body, *ids).array(|id| {
                    let span = id.skip()?;
                    let text = std::str::from_utf8(&body[span.from..span.to]);
                    let id = text.ok().and_then(|text| text.parse::<u32>().ok());
                    self.chain
                        .put(&id.ok_or(Unreadable::Malformed)?.to_le_bytes());
                    Ok(())
                })
            }
        }
    }

    pub(super) fn chat(
        &mut self,
        messages: Option<Span>,
        tools: Option<Span>,
    ) -> Result<(), Unreadable> {
        let body = self.body;
        let mut all = Vec::new();
        let messages = messages.ok_or(Unreadable::Malformed)?;
        Scanner::within(body, messages).array(|item| {
            if all.len() >= MAX_MESSAGES {
                return Err(Unreadable::TooMany);
            }
            all.push(find(body, item)?);
            Ok(())
        })?;
        let system = |message: &Message| {
            let role = message.role.map(|role| &body[role.from + 1..role.to - 1]);
            role.is_some_and(|role| says(role, b"system") || says(role, b"developer"))
        };
        let leading = all.iter().take_while(|message| system(message)).count();
        if self.profile.late_system == LateSystem::Hoisted {
            // Stable: hoisted ones keep their order behind the leading ones.
            all[leading..].sort_by_key(|message| !system(message));
        }
        let user = |message: &Message| {
            let role = message.role.map(|role| &body[role.from + 1..role.to - 1]);
            role.is_some_and(|role| says(role, b"user"))
        };
        let last_user = all.iter().rposition(user);
        let tools_at = match self.profile.tools {
            ToolsOrder::ToolsFirst => 0,
            ToolsOrder::SystemTools => all.iter().take_while(|message| system(message)).count(),
            ToolsOrder::FirstUser => all.iter().position(user).unwrap_or(all.len()),
            ToolsOrder::LastUser => last_user.unwrap_or(all.len()),
        };
        for (at, message) in all.iter().enumerate() {
            if at == tools_at {
                self.tools(tools)?;
            }
            let reasons = match self.profile.reasoning {
                Reasoning::Kept => true,
                // What is behind the last user message belongs to the turn that goes on.
                Reasoning::OfTurn => last_user.is_none_or(|last| at > last),
                Reasoning::Dropped => false,
            };
            self.message(message, reasons)?;
        }
        if tools_at >= all.len() {
            self.tools(tools)?;
        }
        Ok(())
    }

    fn tools(&mut self, tools: Option<Span>) -> Result<(), Unreadable> {
        let Some(tools) = tools else { return Ok(()) };
        let body = self.body;
        let mut scanner = Scanner::within(body, tools);
        if scanner.kind()? != Kind::Array {
            return Err(Unreadable::Malformed);
        }
        scanner.array(|item| {
            let span = item.skip()?;
            self.tool(span)
        })
    }

    fn tool(&mut self, tool: Span) -> Result<(), Unreadable> {
        let body = self.body;
        let mut function = None;
        let mut scanner = Scanner::within(body, tool);
        if scanner.kind()? == Kind::Object {
            scanner.object(|key, value| {
                let is_object = value.kind()? == Kind::Object;
                let span = value.skip()?;
                if is_object && says(&body[key.from..key.to], b"function") {
                    function = Some(span);
                }
                Ok(())
            })?;
        }
        self.chain.tag(TOOL);
        let Some(function) = function else {
            return self.unknown_tool(tool);
        };
        const RENDERED: [&[u8]; 4] = [b"name", b"description", b"parameters", b"strict"];
        let mut members: [Option<Span>; 4] = [None; 4];
        Scanner::within(body, function).object(|key, item| {
            let span = item.skip()?;
            let raw = &body[key.from..key.to];
            if let Some(at) = RENDERED.iter().position(|name| says(raw, name)) {
                members[at] = Some(span);
            }
            Ok(())
        })?;
        let mut put = |bytes: &[u8]| self.chain.put(bytes);
        put(b"{");
        for (name, member) in RENDERED.iter().zip(members) {
            if let Some(span) = member {
                put(STRING);
                put(name);
                put(STRING_END);
                value(body, span, &mut put)?;
            }
        }
        put(b"}");
        Ok(())
    }

    /// A tool of another type, whole; only at its top is `cache_control` nobody's business.
    fn unknown_tool(&mut self, tool: Span) -> Result<(), Unreadable> {
        let body = self.body;
        let mut put = |bytes: &[u8]| self.chain.put(bytes);
        let mut scanner = Scanner::within(body, tool);
        if scanner.kind()? != Kind::Object {
            return value(body, tool, &mut put);
        }
        put(b"{");
        scanner.object(|key, item| {
            if says(&body[key.from..key.to], b"cache_control") {
                return item.skip().map(drop);
            }
            member(body, key, item, &mut put)
        })?;
        put(b"}");
        Ok(())
    }

    fn message(&mut self, message: &Message, reasons: bool) -> Result<(), Unreadable> {
        let body = self.body;
        let role = message.role.ok_or(Unreadable::Malformed)?;
        let raw = &body[role.from + 1..role.to - 1];
        self.chain.tag(ROLE);
        if says(raw, b"developer") && !self.profile.developer {
            self.chain.tag(b"system");
        } else {
            unescape(raw, |piece| self.chain.tag(piece))?;
        }
        let tool = says(raw, b"tool");
        if let Some(name) = message.name.filter(|_| tool || self.profile.names) {
            self.chain.tag(NAME);
            self.text_if_string(name)?;
        }
        // Templates render it before the answer: two answers that differ in it only share neither.
        if let Some(reasoning) = message.reasoning.filter(|_| reasons) {
            self.chain.tag(REASONING);
            self.text_if_string(reasoning)?;
        }
        self.chain.tag(CONTENT);
        if let Some(content) = message.content {
            self.content(content)?;
        }
        match message.calls {
            Some(calls) => self.calls(calls),
            None => Ok(()),
        }
    }

    fn content(&mut self, content: Span) -> Result<(), Unreadable> {
        let body = self.body;
        let mut scanner = Scanner::within(body, content);
        match scanner.kind()? {
            Kind::String => self.string(content),
            Kind::Array => {
                let mut text_before = false;
                scanner.array(|part| {
                    if part.kind()? == Kind::String {
                        let span = part.skip()?;
                        return self.text_part(span, &mut text_before);
                    }
                    let span = part.skip()?;
                    self.part(span, &mut text_before)
                })
            }
            _ => Err(Unreadable::Malformed),
        }
    }

    fn text_part(&mut self, text: Span, text_before: &mut bool) -> Result<(), Unreadable> {
        if *text_before && self.profile.parts_on_lines {
            self.chain.put(b"\n");
        }
        *text_before = true;
        self.text_if_string(text)
    }

    fn part(&mut self, part: Span, text_before: &mut bool) -> Result<(), Unreadable> {
        let body = self.body;
        let (mut kind, mut text, mut refusal, mut other) = (None, None, None, false);
        Scanner::within(body, part).object(|key, item| {
            let span = item.skip()?;
            let raw = &body[key.from..key.to];
            if says(raw, b"type") {
                kind = Some(span);
            } else if says(raw, b"text") {
                text = Some(span);
            } else if says(raw, b"refusal") {
                refusal = Some(span);
            } else if !says(raw, b"cache_control") {
                other = true;
            }
            Ok(())
        })?;
        let text = match kind {
            Some(kind) if TEXT_KINDS.iter().any(|one| self.is(kind, one)) => text,
            Some(kind) if self.is(kind, b"refusal") => refusal,
            Some(_) => None,
            None if !other => text.or(refusal),
            None => None,
        };
        match text {
            Some(text) => self.text_part(text, text_before),
            None if other => self.media(kind, part),
            None => Err(Unreadable::Malformed),
        }
    }

    fn is(&self, span: Span, text: &[u8]) -> bool {
        span.to - span.from >= 2 && says(&self.body[span.from + 1..span.to - 1], text)
    }

    /// An image, a sound or a file: by its kind, and by what the member of that name says: its URL, or
    /// what a `data:` URL holds, and its `detail`. An engine that is given a `uuid` goes by that. Where
    /// nothing is named like the kind, all that is there counts.
    fn media(&mut self, kind: Option<Span>, part: Span) -> Result<(), Unreadable> {
        let body = self.body;
        let mut hasher = self.chain.media_hasher();
        let (mut named, mut uuid) = (None, None);
        if let Some(kind) = kind {
            let mut name = Vec::new();
            let raw = Scanner::within(body, kind).string()?;
            unescape(&body[raw.from..raw.to], |piece| {
                name.extend_from_slice(piece);
            })?;
            Scanner::within(body, part).object(|key, item| {
                let span = item.skip()?;
                let raw = &body[key.from..key.to];
                if says(raw, &name) {
                    named = Some(span);
                } else if says(raw, b"uuid") {
                    uuid = Some(span);
                }
                Ok(())
            })?;
        }
        match (kind, named) {
            (Some(kind), Some(named)) => {
                for span in [Some(kind), Some(named), uuid].into_iter().flatten() {
                    hash_members(body, span, 1, &mut hasher)?;
                }
            }
            _ => hash_members(body, part, 2, &mut hasher)?,
        }
        self.chain.medium(MEDIA, &finish(&hasher));
        Ok(())
    }

    fn calls(&mut self, calls: Span) -> Result<(), Unreadable> {
        let body = self.body;
        let mut scanner = Scanner::within(body, calls);
        if scanner.kind()? != Kind::Array {
            return Err(Unreadable::Malformed);
        }
        scanner.array(|call| {
            let mut function = None;
            let span = call.skip()?;
            Scanner::within(body, span).object(|key, item| {
                let span = item.skip()?;
                if says(&body[key.from..key.to], b"function") {
                    function = Some(span);
                }
                Ok(())
            })?;
            let Some(function) = function else {
                // Of a type that is not known: all of it.
                self.chain.tag(CALL);
                return value(body, span, &mut |bytes| self.chain.put(bytes));
            };
            let (mut name, mut arguments) = (None, None);
            Scanner::within(body, function).object(|key, item| {
                let span = item.skip()?;
                let raw = &body[key.from..key.to];
                if says(raw, b"name") {
                    name = Some(span);
                } else if says(raw, b"arguments") {
                    arguments = Some(span);
                }
                Ok(())
            })?;
            self.chain.tag(CALL);
            if let Some(name) = name {
                self.text_if_string(name)?;
            }
            self.chain.tag(ARGUMENTS);
            self.arguments(arguments)
        })
    }

    /// A string that holds JSON, which the renderer reads: its spelling does not count.
    fn arguments(&mut self, arguments: Option<Span>) -> Result<(), Unreadable> {
        let Some(span) = arguments else {
            self.chain.put(b"{}");
            return Ok(());
        };
        let mut scanner = Scanner::within(self.body, span);
        match scanner.kind()? {
            Kind::String => {}
            Kind::Null => return self.arguments(None),
            _ => return value(self.body, span, &mut |bytes| self.chain.put(bytes)),
        }
        let raw = scanner.string()?;
        let mut text = Vec::new();
        unescape(&self.body[raw.from..raw.to], |piece| {
            text.extend_from_slice(piece);
        })?;
        if text.iter().all(u8::is_ascii_whitespace) {
            self.chain.put(b"{}");
            return Ok(());
        }
        let mut canonical = Vec::with_capacity(text.len());
        let whole = Span {
            from: 0,
            to: text.len(),
        };
        let mut inner = Scanner::new(&text);
        let json = inner.skip().and_then(|_| inner.end()).and_then(|()| {
            value(&text, whole, &mut |bytes| {
                canonical.extend_from_slice(bytes);
            })
        });
        self.chain
            .put(if json.is_ok() { &canonical } else { &text });
        Ok(())
    }

    /// A string that is given as its whole span, quotes included.
    fn string(&mut self, span: Span) -> Result<(), Unreadable> {
        unescape(&self.body[span.from + 1..span.to - 1], |piece| {
            self.chain.put(piece);
        })
    }

    fn text_if_string(&mut self, span: Span) -> Result<(), Unreadable> {
        if Scanner::within(self.body, span).kind()? == Kind::String {
            self.string(span)
        } else {
            value(self.body, span, &mut |bytes| self.chain.put(bytes))
        }
    }
}

fn find(body: &[u8], item: &mut Scanner<'_>) -> Result<Message, Unreadable> {
    let mut message = Message::default();
    item.object(|key, value| {
        let kind = value.kind()?;
        let span = value.skip()?;
        let raw = &body[key.from..key.to];
        let some = (kind != Kind::Null).then_some(span);
        if says(raw, b"role") {
            message.role = some.filter(|_| kind == Kind::String);
        } else if says(raw, b"content") {
            message.content = some;
        } else if says(raw, b"name") {
            message.name = some;
        } else if says(raw, b"reasoning") || says(raw, b"reasoning_content") {
            message.reasoning = some.or(message.reasoning);
        } else if says(raw, b"tool_calls") {
            message.calls = some;
        }
        Ok(())
    })?;
    Ok(message)
}

/// Members of an object in the order of their names, objects among them likewise down to `levels`; or
/// one value that is none.
fn hash_members(
    body: &[u8],
    span: Span,
    levels: u32,
    hasher: &mut SipHasher13,
) -> Result<(), Unreadable> {
    let mut scanner = Scanner::within(body, span);
    if levels == 0 || scanner.kind()? != Kind::Object {
        return hash_value(body, span, hasher);
    }
    let mut members = Vec::new();
    scanner.object(|key, item| {
        let span = item.skip()?;
        let mut name = Vec::new();
        unescape(&body[key.from..key.to], |piece| {
            name.extend_from_slice(piece);
        })?;
        if members.len() >= MAX_MEMBERS {
            return Err(Unreadable::TooMany);
        }
        if name != b"cache_control" {
            members.push((name, span));
        }
        Ok(())
    })?;
    // Of a name that is there twice, the last.
    members.sort_by(|one, other| one.0.cmp(&other.0));
    hasher.write(&[0xff, 1]);
    for (at, (name, span)) in members.iter().enumerate() {
        if members.get(at + 1).is_some_and(|next| next.0 == *name) {
            continue;
        }
        hasher.write(&[0xff, 2]);
        hasher.write(name);
        hash_members(body, *span, levels - 1, hasher)?;
    }
    hasher.write(&[0xff, 3]);
    Ok(())
}

/// A string is its text, or what it holds where it is a `data:` URL; which of them, is said.
fn hash_value(body: &[u8], span: Span, hasher: &mut SipHasher13) -> Result<(), Unreadable> {
    let mut scanner = Scanner::within(body, span);
    if scanner.kind()? != Kind::String {
        hasher.write(&[0xff, 4]);
        return value(body, span, &mut |bytes| hasher.write(bytes));
    }
    let raw = scanner.string()?;
    let mut text = Vec::new();
    unescape(&body[raw.from..raw.to], |piece| {
        text.extend_from_slice(piece);
    })?;
    match decoded(&text) {
        Some(bytes) => {
            hasher.write(&[0xff, 5]);
            // Not text: where it ends has to be told.
            hasher.write(&(bytes.len() as u64).to_le_bytes());
            hasher.write(&bytes);
        }
        None => {
            hasher.write(&[0xff, 6]);
            hasher.write(&text);
        }
    }
    Ok(())
}

/// What a `data:` URL with base64 holds.
fn decoded(url: &[u8]) -> Option<Vec<u8>> {
    let rest = url.strip_prefix(b"data:")?;
    let comma = memchr::memchr(b',', rest)?;
    let (head, data) = rest.split_at(comma);
    head.ends_with(b";base64").then_some(())?;
    base64::engine::general_purpose::STANDARD
        .decode(&data[1..])
        .ok()
}

/// A JSON value, compact: keys in their order, strings between `FD` and `FC`, numbers as Python
/// would print them back.
pub(super) fn value(body: &[u8], span: Span, put: &mut dyn FnMut(&[u8])) -> Result<(), Unreadable> {
    nested(body, &mut Scanner::within(body, span), put)
}

fn nested(
    body: &[u8],
    scanner: &mut Scanner<'_>,
    put: &mut dyn FnMut(&[u8]),
) -> Result<(), Unreadable> {
    match scanner.kind()? {
        Kind::Object => {
            put(b"{");
            scanner.object(|key, item| member(body, key, item, put))?;
            put(b"}");
        }
        Kind::Array => {
            put(b"[");
            let mut first = true;
            scanner.array(|item| {
                if !std::mem::take(&mut first) {
                    put(b",");
                }
                nested(body, item, put)
            })?;
            put(b"]");
        }
        Kind::String => {
            let raw = scanner.string()?;
            put(STRING);
            unescape(&body[raw.from..raw.to], &mut *put)?;
            put(STRING_END);
        }
        Kind::Number => {
            let span = scanner.skip()?;
            number(&body[span.from..span.to], put);
        }
        Kind::True | Kind::False | Kind::Null => {
            let span = scanner.skip()?;
            put(&body[span.from..span.to]);
        }
    }
    Ok(())
}

fn member(
    body: &[u8],
    key: Span,
    item: &mut Scanner<'_>,
    put: &mut dyn FnMut(&[u8]),
) -> Result<(), Unreadable> {
    put(STRING);
    unescape(&body[key.from..key.to], &mut *put)?;
    put(STRING_END);
    nested(body, item, put)
}

fn number(text: &[u8], put: &mut dyn FnMut(&[u8])) {
    let real = text.iter().any(|byte| matches!(byte, b'.' | b'e' | b'E'));
    let parsed = std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse::<f64>().ok());
    match parsed.filter(|value| real && value.is_finite()) {
        Some(value) => put(format!("{value:?}").as_bytes()),
        None => put(text),
    }
}
