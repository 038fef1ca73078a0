//! The rows of `docs/bounds.toml`, and the page that is made of them.

use std::fmt::Write as _;

use serde::Deserialize;

use super::sources::Sources;

/// What the data say.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bounds {
    /// In the order of the page.
    pub part: Vec<Part>,
    /// What lives for one call or message.
    #[serde(default)]
    pub brief: Vec<Brief>,
    /// What nothing of ours bounds.
    #[serde(default)]
    pub open: Vec<Open>,
}

/// One process, or what several have.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    title: String,
    about: String,
    #[serde(default)]
    pub row: Vec<Row>,
}

/// One container, or several that are bounded alike.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    pub file: String,
    pub fields: Vec<String>,
    holds: String,
    bound: String,
    full: String,
}

/// Containers of values that live for one call.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Brief {
    pub file: String,
    pub fields: Vec<String>,
    /// For what they live.
    #[serde(rename = "for")]
    lives_for: String,
}

/// Something that grows as others let it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Open {
    what: String,
    why: String,
}

impl Bounds {
    pub fn read(text: &str) -> Self {
        toml::from_str(text).unwrap_or_else(|error| panic!("docs/bounds.toml: {error}"))
    }

    /// Every file and field that has a row.
    pub fn named(&self) -> impl Iterator<Item = (&str, &str)> {
        let rows = self.part.iter().flat_map(|part| &part.row);
        let rows = rows.map(|row| (&row.file, &row.fields));
        let brief = self.brief.iter().map(|row| (&row.file, &row.fields));
        rows.chain(brief)
            .flat_map(|(file, fields)| fields.iter().map(|field| (file.as_str(), field.as_str())))
    }

    /// The page; the constants that it names are as the sources have them.
    ///
    /// # Errors
    ///
    /// Says which constant there is not, or is in more than one place with more than one value.
    pub fn page(&self, sources: &Sources) -> Result<String, String> {
        let mut page = String::from(HEAD);
        for part in &self.part {
            let Part { title, about, row } = part;
            let about = with_constants(about, "", sources)?;
            write!(page, "\n## {title}\n\n{about}\n").unwrap();
            if row.is_empty() {
                continue;
            }
            page += "\n| what | bound | at the bound | where |\n|---|---|---|---|\n";
            for row in row {
                let bound = with_constants(&row.bound, &row.file, sources)?;
                let full = with_constants(&row.full, &row.file, sources)?;
                let fields: Vec<String> = row
                    .fields
                    .iter()
                    .map(|field| format!("`{field}`"))
                    .collect();
                let file = row.file.replace("/src/", "::").replace(".rs", "");
                let (holds, fields) = (&row.holds, fields.join(", "));
                writeln!(page, "| {holds} | {bound} | {full} | {fields} in {file} |").unwrap();
            }
        }
        page += "\n## What nothing of ours bounds\n\n";
        for Open { what, why } in &self.open {
            writeln!(page, "* **{what}** {}", with_constants(why, "", sources)?).unwrap();
        }
        page += BRIEF;
        let mut brief: Vec<String> = self
            .brief
            .iter()
            .map(|row| format!("{} ({})", row.fields.join(", "), row.lives_for))
            .collect();
        brief.sort();
        writeln!(page, "{}.", brief.join("; ")).unwrap();
        Ok(page)
    }
}

/// Each `{NAME}` as the constant and its value, for people.
fn with_constants(text: &str, file: &str, sources: &Sources) -> Result<String, String> {
    let (mut out, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once('{') {
        let (name, behind) = after
            .split_once('}')
            .ok_or_else(|| format!("an open brace in {text:?}"))?;
        let value = sources.constant(file, name).ok_or_else(|| {
            format!("there is no one value of {name}, named by a row of {file}: write {{path/to/file.rs::NAME}}")
        })?;
        let short = name.rsplit("::").next().unwrap_or(name);
        let shown = shown(&value, short.to_lowercase().contains("bytes"));
        write!(out, "{before}{shown} (`{short}`)").unwrap();
        rest = behind;
    }
    Ok(out + rest)
}

/// `1 << 20` as `1,048,576` or `1 MiB`; what is no number as it is.
pub fn shown(value: &str, is_bytes: bool) -> String {
    if let Some(seconds) = value.strip_prefix("Duration::from_secs(") {
        return format!("{} s", seconds.trim_end_matches(')'));
    }
    if let Some(millis) = value.strip_prefix("Duration::from_millis(") {
        return format!("{} ms", millis.trim_end_matches(')'));
    }
    let number = |text: &str| text.trim().replace('_', "").parse::<u64>().ok();
    let parsed = match (value.split_once("<<"), value.split_once('*')) {
        (Some((base, shift)), _) => number(base).zip(number(shift)).map(|(b, s)| b << s),
        (None, Some((one, other))) => number(one).zip(number(other)).map(|(a, b)| a * b),
        (None, None) => number(value),
    };
    let Some(parsed) = parsed else {
        return value.to_owned();
    };
    for (unit, size) in [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if is_bytes && parsed % size == 0 && parsed > 0 {
            return format!("{} {unit}", parsed / size);
        }
    }
    let digits = parsed.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    if is_bytes {
        format!("{out} bytes")
    } else {
        out
    }
}

const HEAD: &str = "\
# Bounds

What each process keeps, how much of it there can be, and what happens when that is full. Written from
[bounds.toml](bounds.toml) by `FOREBAY_WRITE_DOCS=1 cargo test -p forebay --test bounds`; the values of constants are those of
the sources, and the test fails when a map, set, queue, channel or semaphore of the processes has no row.
";

const BRIEF: &str = "
## For one call

Messages, requests and answers are bounded by what parsed them: the frames of [wire.md](wire.md) by their kind before anything
is buffered, bodies and heads of HTTP by the limits above, documents by their own. So are the values that live for one
call. Of these are containers: ";
