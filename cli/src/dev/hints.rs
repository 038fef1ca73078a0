//! What `dev` prints when the fleet is up: how to use it, as it can be pasted.

use std::net::SocketAddr;
use std::path::Path;

/// What the lines are about.
pub(super) struct Hints<'a> {
    /// The data directory.
    pub(super) dir: &'a Path,
    /// Where balancers take requests.
    pub(super) listen: &'a [SocketAddr],
    /// The model that is served.
    pub(super) model: &'a str,
    /// How a shell finds this program.
    pub(super) program: &'a str,
}

impl Hints<'_> {
    /// The lines.
    pub(super) fn text(&self) -> String {
        let urls: Vec<String> = self.listen.iter().map(|at| base_url(*at)).collect();
        let first = &urls[0];
        let all = urls.iter().map(|url| format!("  {url}/v1\n"));
        let targets: Vec<String> = urls.iter().map(|url| format!("--target {url}")).collect();
        let (model, targets) = (self.model, targets.join(" "));
        let context = quoted(&self.dir.join("context.toml").display().to_string());
        let all: String = all.collect();
        format!(
            r#"OpenAI-compatible endpoint, any API key:
{all}
With curl:
  curl -N {first}/v1/chat/completions -H 'Content-Type: application/json' -d '{{"model": "{model}", "stream": true, "max_tokens": 16, "messages": [{{"role": "user", "content": "Hello"}}]}}'

With Python (pip install openai):
  python3 -c '
from openai import OpenAI
client = OpenAI(base_url="{first}/v1", api_key="dev")
answer = client.chat.completions.create(model="{model}", max_tokens=16, messages=[{{"role": "user", "content": "Hello"}}])
print(answer.choices[0].message.content)
'

In another terminal:
  export FOREBAY_CONTEXT={context}
  {program} status
  {program} replay {targets} --limit 200

Processes: {run}; logs: {logs}
Kill some and watch; `{program} dev start --data-dir {dir}` starts the dead again.
"#,
            program = self.program,
            run = self.dir.join("run.json").display(),
            logs = self.dir.join("logs").display(),
            dir = quoted(&self.dir.display().to_string()),
        )
    }
}

/// The URL at which a client on this machine reaches a listener.
pub(super) fn base_url(at: SocketAddr) -> String {
    let mut at = at;
    if at.ip().is_unspecified() {
        let loopback = if at.is_ipv4() {
            [127, 0, 0, 1].into()
        } else {
            std::net::Ipv6Addr::LOCALHOST.into()
        };
        at.set_ip(loopback);
    }
    format!("http://{at}")
}

/// How a shell finds this program: by its name where that leads to it, else by its path, so that
/// what is printed works for those who run it from where it was built.
pub(super) fn program() -> String {
    let Ok(own) = std::env::current_exe().and_then(|path| path.canonicalize()) else {
        return NAME.into();
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join(NAME))
        .find(|file| file.is_file());
    if found.and_then(|file| file.canonicalize().ok()).as_ref() == Some(&own) {
        return NAME.into();
    }
    quoted(&own.display().to_string())
}

const NAME: &str = "forebay";

/// A word for the shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_can_be_pasted() {
        let hints = Hints {
            dir: Path::new("/tmp/it's here"),
            listen: &[
                "0.0.0.0:8080".parse().unwrap(),
                "0.0.0.0:8081".parse().unwrap(),
            ],
            model: "emulated",
            program: "./target/debug/forebay",
        };
        let text = hints.text();
        assert!(text.contains("http://127.0.0.1:8081/v1\n"), "{text}");
        assert!(
            text.contains("\n  ./target/debug/forebay status\n"),
            "{text}"
        );
        assert!(
            text.contains(r"export FOREBAY_CONTEXT='/tmp/it'\''s here/context.toml'"),
            "{text}"
        );
        let body = text
            .split("-d '")
            .nth(1)
            .unwrap()
            .split('\'')
            .next()
            .unwrap();
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["model"], "emulated");
    }
}
