//! The containers that the sources of the processes declare, found by their text.
//!
//! No parser of Rust: comments, strings and what is for tests only are blanked out, and then the bodies of structs
//! and enums are cut at their commas. It finds more rather than less: a type counts when it names a container
//! anywhere, or an alias of one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Where processes' code is.
const ROOTS: [&str; 11] = [
    "proto/src",
    "proto/link/src",
    "proto/admin/src",
    "scheduler/src",
    "consensus/src",
    "consensus/client/src",
    "consensus/controller/src",
    "balancer/src",
    "worker-agent/src",
    "cli/src/roles",
    "cli/src/dev",
];

/// What grows, or lets others wait.
const CONTAINERS: [&str; 13] = [
    "BTreeMap<",
    "BTreeSet<",
    "HashMap<",
    "HashSet<",
    "DashMap<",
    "DashSet<",
    "IndexMap<",
    "VecDeque<",
    "BinaryHeap<",
    "Slab<",
    "Family<",
    "JoinSet<",
    "Semaphore",
];

/// What makes one that is no field, and where it is from. Those of one value (`oneshot`, `watch`) are bounded by
/// themselves.
const MADE: [(&str, &[&str]); 6] = [
    ("channel", &["mpsc", "broadcast"]),
    ("unbounded_channel", &["mpsc"]),
    ("sync_channel", &["mpsc"]),
    ("bounded", &["channel", "crossbeam_channel"]),
    ("unbounded", &["channel", "crossbeam_channel"]),
    ("new", &["JoinSet"]),
];

/// The sources, without what is for tests.
pub struct Sources {
    /// By path from the root of the tree.
    files: BTreeMap<String, Source>,
    /// Aliases with parameters, which other files may name.
    aliases: BTreeSet<String>,
}

struct Source {
    code: String,
    fields: Vec<Declared>,
    /// Of its own, without parameters: other files may have another type of that name.
    aliases: BTreeSet<String>,
}

/// One field, or what one function makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declared {
    /// `Struct.field`, `Enum.Variant`, `STATIC`, or `function(): channel`.
    pub name: String,
    /// Its type, on one line.
    pub kind: String,
}

impl Sources {
    /// Reads the tree that the tests are in.
    pub fn read() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut paths = Vec::new();
        for folder in ROOTS {
            collect(&root.join(folder), &mut paths);
        }
        let name = |path: &Path| {
            let within = path.strip_prefix(&root).unwrap();
            within.to_str().unwrap().to_owned()
        };
        let read = |path: &PathBuf| (name(path), std::fs::read_to_string(path).unwrap());
        Self::of(paths.iter().map(read))
    }

    /// The same of given texts, by path.
    pub fn of(texts: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut files = BTreeMap::new();
        let mut for_tests: Vec<String> = Vec::new();
        for (path, text) in texts {
            let (code, modules) = without_tests(&blanked(&text));
            let at = path.strip_suffix(".rs").unwrap_or(&path);
            let folder = match at.rsplit_once('/') {
                Some((folder, "mod" | "lib" | "main")) => folder,
                _ => at,
            };
            for_tests.extend(modules.iter().map(|module| format!("{folder}/{module}")));
            let fields = fields(&code);
            let source = Source {
                aliases: BTreeSet::new(),
                code,
                fields,
            };
            files.insert(path, source);
        }
        files.retain(|path, _| {
            let under = |module: &String| {
                let rest = path.strip_prefix(module.as_str());
                rest.is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
            };
            let by_name = path.ends_with("_tests.rs") || path.ends_with("/tests.rs");
            !by_name && !for_tests.iter().any(under)
        });
        let mut aliases = BTreeSet::new();
        for source in files.values_mut() {
            let Source { code, .. } = &*source;
            let mut own = BTreeSet::new();
            for at in words(code, "type") {
                let rest = &code[at + "type".len()..];
                let line = rest.split(';').next().unwrap_or_default();
                if let Some((name, of)) = line.split_once('=')
                    && CONTAINERS.iter().any(|container| of.contains(container))
                {
                    let alias = identifier(name.trim_start());
                    if name.contains('<') {
                        aliases.insert(format!("{alias}<"));
                    } else {
                        own.insert(alias.to_owned());
                    }
                }
            }
            source.aliases = own;
        }
        Self { files, aliases }
    }

    /// Whether a file declares this, or has a function with this variable (`function(): variable`).
    pub fn has(&self, path: &str, name: &str) -> bool {
        let Some(Source { code, fields, .. }) = self.files.get(path) else {
            return false;
        };
        match name.split_once("(): ") {
            None => fields.iter().any(|declared| declared.name == name),
            Some((_, "channel" | "tasks")) => made(code).any(|declared| declared.name == name),
            Some((function, variable)) => {
                let has = |word: &str| words(code, word).next().is_some();
                has(function) && has(variable)
            }
        }
    }

    /// What has to have a row: the type, by path and name.
    pub fn containers(&self) -> BTreeMap<(String, String), String> {
        let mut found = BTreeMap::new();
        for (path, source) in &self.files {
            let Source {
                code,
                fields,
                aliases,
            } = source;
            let fields = fields.iter().cloned();
            let aliased = |kind: &str| {
                aliases
                    .iter()
                    .any(|alias| words(kind, alias).next().is_some())
            };
            let grows =
                fields.filter(|declared| self.grows(&declared.kind) || aliased(&declared.kind));
            for Declared { name, kind } in grows.chain(made(code)) {
                found.entry((path.clone(), name)).or_insert(kind);
            }
        }
        found
    }

    fn grows(&self, kind: &str) -> bool {
        let names = |container: &str| {
            let starts = kind.match_indices(container).map(|(at, _)| at);
            starts
                .into_iter()
                .any(|at| !kind[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
        };
        CONTAINERS.iter().any(|container| names(container))
            || self.aliases.iter().any(|alias| names(alias))
    }

    /// What a constant, or the default of a field, is set to: of this file, or the only one of its name.
    pub fn constant(&self, path: &str, name: &str) -> Option<String> {
        let (path, name) = name.split_once("::").unwrap_or((path, name));
        let of = |Source { code, .. }: &Source| {
            words(code, name).find_map(|at| {
                let before = code[..at].trim_end();
                let rest = &code[at + name.len()..];
                if before.ends_with("const") {
                    let value = rest.split(';').next()?.split_once('=')?.1;
                    return Some(value.trim().to_owned());
                }
                // A default, and not the type of a field.
                let value = rest.strip_prefix(": ")?.split([',', ';', '}']).next()?;
                let value = value.trim();
                let is_value = value.contains(|c: char| c.is_ascii_digit());
                (is_value && !value.contains(['<', '[', '&']) || value.contains("<<"))
                    .then(|| value.to_owned())
            })
        };
        if let Some(value) = self.files.get(path).and_then(of) {
            return Some(value);
        }
        let elsewhere: BTreeSet<String> = self.files.values().filter_map(of).collect();
        elsewhere.first().filter(|_| elsewhere.len() == 1).cloned()
    }
}

fn collect(folder: &Path, into: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            collect(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

/// The text with comments gone and strings and characters empty.
fn blanked(text: &str) -> String {
    let (bytes, mut out, mut at) = (text.as_bytes(), String::new(), 0);
    let upto = |from: usize, end: &str| text[from..].find(end).map(|found| from + found);
    while at < bytes.len() {
        let rest = &text[at..];
        if rest.starts_with("//") {
            at = upto(at, "\n").unwrap_or(text.len());
        } else if rest.starts_with("/*") {
            at = upto(at, "*/").map_or(text.len(), |end| end + 2);
        } else if let Some(hashes) = raw_string(rest)
            && !out.ends_with(|c: char| c.is_alphanumeric() || c == '_')
        {
            let end = format!("\"{}", "#".repeat(hashes));
            let from = at + 2 + hashes;
            at = upto(from, &end).map_or(text.len(), |found| found + end.len());
            out.push_str("\"\"");
        } else if rest.starts_with('"') {
            at += 1;
            while at < bytes.len() && bytes[at] != b'"' {
                at += if bytes[at] == b'\\' { 2 } else { 1 };
            }
            at += 1;
            out.push_str("\"\"");
        } else if let Some(length) = character(rest) {
            at += length;
            out.push_str("' '");
        } else {
            let next = rest.chars().next().unwrap_or(' ');
            out.push(next);
            at += next.len_utf8();
        }
    }
    out
}

/// The hashes of a raw string that begins here.
fn raw_string(rest: &str) -> Option<usize> {
    let rest = rest.strip_prefix('r')?;
    let hashes = rest.len() - rest.trim_start_matches('#').len();
    rest[hashes..].starts_with('"').then_some(hashes)
}

/// The length of a character literal that begins here; a lifetime is none.
fn character(rest: &str) -> Option<usize> {
    let mut chars = rest.strip_prefix('\'')?.char_indices();
    let (_, first) = chars.next()?;
    if first == '\\' {
        let (escaped, _) = chars.next()?;
        let end = rest[1 + escaped + 1..].find('\'')?;
        return Some(1 + escaped + 1 + end + 1);
    }
    let (at, second) = chars.next()?;
    (second == '\'').then_some(1 + at + 1)
}

/// The code without items for tests, and the modules that are.
fn without_tests(code: &str) -> (String, Vec<String>) {
    const MARK: &str = "#[cfg(test)]";
    let (mut out, mut modules, mut rest) = (String::new(), Vec::new(), code);
    while let Some(at) = rest.find(MARK) {
        out.push_str(&rest[..at]);
        let mut item = rest[at + MARK.len()..].trim_start();
        while item.starts_with("#[") {
            item = item[item.find(']').map_or(item.len(), |end| end + 1)..].trim_start();
        }
        let end = end_of_item(item);
        if let Some(at) = words(&item[..end], "mod").next() {
            modules.push(identifier(item[at + 3..].trim_start()).to_owned());
        }
        rest = &item[end..];
    }
    out.push_str(rest);
    (out, modules)
}

/// Behind the item that begins here: its semicolon, its body, or the comma after a field.
fn end_of_item(item: &str) -> usize {
    let mut depth = 0_usize;
    for (at, character) in item.char_indices() {
        match character {
            '(' | '[' | '<' => depth += 1,
            ')' | ']' => depth = depth.saturating_sub(1),
            '>' if !item[..at].ends_with(['-', '=']) => depth = depth.saturating_sub(1),
            ';' | ',' if depth == 0 => return at + 1,
            '{' => return at + body(&item[at..]).len() + 2,
            _ => {}
        }
    }
    item.len()
}

/// What is between the bracket that the text begins with and the one that closes it.
fn body(text: &str) -> &str {
    let mut depth = 0_usize;
    for (at, character) in text.char_indices() {
        match character {
            '{' | '(' | '[' => depth += 1,
            '}' | ')' | ']' => {
                depth -= 1;
                if depth == 0 {
                    return &text[1..at];
                }
            }
            _ => {}
        }
    }
    &text[1..]
}

/// Where a word stands by itself.
fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).filter_map(move |(at, _)| {
        let alone = !code[..at].ends_with(part) && !code[at + word.len()..].starts_with(part);
        alone.then_some(at)
    })
}

fn identifier(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    &text[..end.unwrap_or(text.len())]
}

/// Fields of structs, variants of enums, statics.
fn fields(code: &str) -> Vec<Declared> {
    let mut found = Vec::new();
    for keyword in ["struct", "enum"] {
        for at in words(code, keyword) {
            let rest = code[at + keyword.len()..].trim_start();
            let name = identifier(rest);
            let Some(open) = opening(rest) else { continue };
            for (number, piece) in pieces(body(&rest[open..])).into_iter().enumerate() {
                let is_tuple = rest[open..].starts_with('(');
                found.extend(field(name, keyword, is_tuple, number, piece));
            }
        }
    }
    for at in words(code, "static") {
        let rest = code[at + "static".len()..].trim_start();
        let line = rest.split(['=', ';']).next().unwrap_or_default();
        // `&'static` and `: 'static` have no name and type behind them.
        if !code[..at].ends_with('\'')
            && let Some((name, kind)) = line.split_once(':')
        {
            found.push(Declared {
                name: name.trim().trim_start_matches("mut ").to_owned(),
                kind: one_line(kind),
            });
        }
    }
    found
}

/// Where the body of a struct or enum begins; a unit has none.
fn opening(rest: &str) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, character) in rest.char_indices() {
        match character {
            '<' => depth += 1,
            '>' if !rest[..at].ends_with('-') => depth = depth.saturating_sub(1),
            '{' | '(' if depth == 0 => return Some(at),
            ';' | '=' | ')' if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

fn field(
    of: &str,
    keyword: &str,
    is_tuple: bool,
    number: usize,
    mut piece: &str,
) -> Option<Declared> {
    loop {
        piece = piece.trim();
        if piece.starts_with("#[") {
            piece = &piece[1 + body(&piece[1..]).len() + 2..];
        } else if let Some(rest) = piece.strip_prefix("pub(") {
            piece = &rest[rest.find(')')? + 1..];
        } else if let Some(rest) = piece.strip_prefix("pub ") {
            piece = rest;
        } else {
            break;
        }
    }
    if piece.is_empty() {
        return None;
    }
    let (name, kind) = match (keyword, is_tuple) {
        ("enum", _) => {
            let variant = identifier(piece);
            (variant.to_owned(), &piece[variant.len()..])
        }
        (_, true) => (number.to_string(), piece),
        _ => {
            let (name, kind) = piece.split_once(':')?;
            (name.trim().to_owned(), kind)
        }
    };
    Some(Declared {
        name: format!("{of}.{name}"),
        kind: one_line(kind),
    })
}

/// Cut at commas that stand in no bracket.
fn pieces(body: &str) -> Vec<&str> {
    let (mut found, mut from, mut depth) = (Vec::new(), 0, 0_usize);
    for (at, character) in body.char_indices() {
        match character {
            '(' | '[' | '{' | '<' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            '>' if !body[..at].ends_with(['-', '=']) => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                found.push(&body[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    found.push(&body[from..]);
    found
}

/// Channels and sets of tasks, by the function that makes them.
fn made(code: &str) -> impl Iterator<Item = Declared> {
    let found = MADE.iter().flat_map(move |(call, from)| {
        words(code, call).filter_map(move |at| {
            let is_call = code[at + call.len()..].starts_with(['(', ':']);
            let before = &code[..at];
            let qualified = before.strip_suffix("::");
            let maker = match qualified {
                Some(path) => *from.iter().find(|from| {
                    words(path, from)
                        .last()
                        .is_some_and(|at| at + from.len() == path.len())
                })?,
                None => imported(code, call, from)?,
            };
            (is_call && !before.trim_end().ends_with("fn")).then_some((at, *call, maker))
        })
    });
    found.map(|(at, call, maker)| {
        let function = words(&code[..at], "fn").last();
        let function = function.map_or("", |at| identifier(code[at + 2..].trim_start()));
        let what = if maker == "JoinSet" {
            "tasks"
        } else {
            "channel"
        };
        Declared {
            name: format!("{function}(): {what}"),
            kind: format!("{maker}::{call}"),
        }
    })
}

/// From which of these the file imports a function, if it does.
fn imported<'a>(code: &str, call: &str, from: &[&'a str]) -> Option<&'a str> {
    words(code, "use").find_map(|at| {
        let import = code[at..].split(';').next()?;
        words(import, call).next()?;
        let is_from = |from: &&&str| words(import, from).next().is_some();
        from.iter().find(is_from).copied()
    })
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
