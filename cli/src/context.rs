//! Where the control plane is, and with which certificate a verb speaks to it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use forebay_link::{CredentialPaths, Credentials};
use serde::{Deserialize, Serialize};

use crate::exit::CliError;

/// Whom a verb asks, and as whom: flags, then the context file.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Control plane")]
pub(crate) struct ContextArgs {
    /// TOML file with `control`, `ca`, `cert` and `key`; `forebay dev` writes one. Default:
    /// forebay/context.toml in the user's config directory.
    #[arg(long, value_name = "FILE", env = "FOREBAY_CONTEXT")]
    pub(crate) context: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) cell: CellArgs,
    /// Seconds to wait for an answer.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, env = "FOREBAY_TIMEOUT",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) timeout: u64,
}

/// The cell that a process belongs to: its control nodes, and our certificate there.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Control plane")]
pub(crate) struct CellArgs {
    /// Addresses of the control nodes, HOST:PORT with commas between; one that answers suffices.
    #[arg(
        long,
        value_name = "ADDRESSES",
        value_delimiter = ',',
        env = "FOREBAY_CONTROL"
    )]
    pub(crate) control: Vec<String>,
    #[command(flatten)]
    pub(crate) certificate: CertificateArgs,
}

/// Our certificate, its key, and the authority that vouches for all others.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Control plane")]
pub(crate) struct CertificateArgs {
    /// The authority's certificate (PEM), from `forebay ca init`.
    #[arg(long, value_name = "FILE", env = "FOREBAY_CA")]
    pub(crate) ca: Option<PathBuf>,
    /// Our certificate (PEM), from `forebay ca issue`.
    #[arg(long, value_name = "FILE", env = "FOREBAY_CERT")]
    pub(crate) cert: Option<PathBuf>,
    /// Our private key (PEM).
    #[arg(long, value_name = "FILE", env = "FOREBAY_KEY")]
    pub(crate) key: Option<PathBuf>,
}

impl CertificateArgs {
    /// The three files, all of them needed.
    pub(crate) fn paths(&self) -> Result<CredentialPaths, CliError> {
        use crate::settings::required;
        Ok(CredentialPaths {
            ca: required("ca", self.ca.clone())?,
            cert: required("cert", self.cert.clone())?,
            key: required("key", self.key.clone())?,
        })
    }
}

/// A context as a file holds it. Relative paths count from the file's directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ContextFile {
    /// Addresses of the control nodes.
    pub(crate) control: Vec<String>,
    /// The authority's certificate.
    pub(crate) ca: PathBuf,
    /// Our certificate.
    pub(crate) cert: PathBuf,
    /// Our private key.
    pub(crate) key: PathBuf,
    /// Where clients ask balancers: URLs by name, such as `b1 = "http://10.0.0.7:8080"`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) endpoints: BTreeMap<String, String>,
    /// Admin sides of balancers, in the same way.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) balancers: BTreeMap<String, String>,
    /// Admin sides of agents.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) agents: BTreeMap<String, String>,
    /// Admin sides of control nodes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) control_nodes: BTreeMap<String, String>,
}

/// Where the processes of a fleet show themselves over HTTP, as far as a context says. Verbs that look into
/// processes see less without.
#[derive(Clone, Debug, Default)]
pub(crate) struct Urls {
    /// As [`ContextFile::endpoints`].
    pub(crate) endpoints: BTreeMap<String, String>,
    /// As [`ContextFile::balancers`].
    pub(crate) balancers: BTreeMap<String, String>,
    /// As [`ContextFile::agents`].
    pub(crate) agents: BTreeMap<String, String>,
    /// As [`ContextFile::control_nodes`].
    pub(crate) control_nodes: BTreeMap<String, String>,
}

/// Why a verb does not know whom to ask.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContextError {
    /// There is none.
    #[error(
        "no control plane is given and {0} does not exist: `forebay dev` writes a context and prints its `export FOREBAY_CONTEXT=...` line; else give --context FILE, or --control, --ca, --cert and --key"
    )]
    Missing(PathBuf),
    /// The file was named and cannot be read.
    #[error(
        "cannot read the context {path}: {error}; `forebay dev` prints the `export FOREBAY_CONTEXT=...` line of its own, or give --control, --ca, --cert and --key"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// The file is not a context.
    #[error(
        "{path} is not a context: {problem}; it has `control = [\"HOST:PORT\"]`, `ca`, `cert` and `key`, and may have tables of URLs: `endpoints`, `balancers`, `agents`, `control_nodes`"
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// No address.
    #[error("the context names no control node: give --control HOST:PORT")]
    NoAddress,
    /// An address without a form.
    #[error("--control: {0}")]
    Address(String),
}

/// A checked context.
#[derive(Debug)]
pub(crate) struct Context {
    /// Control nodes, at least one.
    pub(crate) control: Vec<String>,
    /// As whom to speak.
    pub(crate) credentials: Credentials,
    /// How long to wait for an answer.
    pub(crate) timeout: Duration,
}

impl ContextArgs {
    /// Flags first; the file gives what they leave out.
    pub(crate) fn resolve(&self) -> Result<Context, CliError> {
        let CellArgs {
            control,
            certificate,
        } = &self.cell;
        let (control, paths) = match (&certificate.ca, &certificate.cert, &certificate.key) {
            (Some(ca), Some(cert), Some(key)) if !control.is_empty() => (
                control.clone(),
                CredentialPaths {
                    ca: ca.clone(),
                    cert: cert.clone(),
                    key: key.clone(),
                },
            ),
            (ca, cert, key) => {
                let file = self.file()?;
                let or = |flag: &Option<PathBuf>, file: PathBuf| flag.clone().unwrap_or(file);
                let paths = CredentialPaths {
                    ca: or(ca, file.ca),
                    cert: or(cert, file.cert),
                    key: or(key, file.key),
                };
                let control = if control.is_empty() {
                    file.control
                } else {
                    control.clone()
                };
                (control, paths)
            }
        };
        check_control(&control)?;
        Ok(Context {
            control,
            credentials: Credentials::load(&paths)?,
            timeout: Duration::from_secs(self.timeout),
        })
    }

    /// Where processes show themselves, as far as the context file says; without one, nowhere.
    pub(crate) fn urls(&self) -> Result<Urls, ContextError> {
        match self.file() {
            Ok(file) => Ok(Urls {
                endpoints: file.endpoints,
                balancers: file.balancers,
                agents: file.agents,
                control_nodes: file.control_nodes,
            }),
            Err(ContextError::Missing(_)) => Ok(Urls::default()),
            Err(error) => Err(error),
        }
    }

    fn file(&self) -> Result<ContextFile, ContextError> {
        let path = self.context.clone().unwrap_or_else(default_path);
        match std::fs::read_to_string(&path) {
            Ok(text) => parse(&path, &text),
            Err(error)
                if self.context.is_none() && error.kind() == std::io::ErrorKind::NotFound =>
            {
                Err(ContextError::Missing(path))
            }
            Err(error) => Err(ContextError::Read { path, error }),
        }
    }
}

/// Checks that there are control nodes to dial.
pub(crate) fn check_control(control: &[String]) -> Result<(), ContextError> {
    if control.is_empty() {
        return Err(ContextError::NoAddress);
    }
    for address in control {
        forebay_proto::fleet::check_address(address).map_err(ContextError::Address)?;
    }
    Ok(())
}

fn parse(path: &Path, text: &str) -> Result<ContextFile, ContextError> {
    let mut file: ContextFile = toml::from_str(text).map_err(|error| ContextError::Malformed {
        path: path.into(),
        problem: error.message().into(),
    })?;
    let base = path.parent().unwrap_or(Path::new(""));
    for entry in [&mut file.ca, &mut file.cert, &mut file.key] {
        *entry = base.join(&entry);
    }
    Ok(file)
}

fn default_path() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let config = from("XDG_CONFIG_HOME").map_or_else(
        || PathBuf::from(from("HOME").unwrap_or_default()).join(".config"),
        PathBuf::from,
    );
    config.join("forebay").join("context.toml")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_a_context_count_from_its_directory() {
        let text = "control = ['h:1']\nca = 'ca.pem'\ncert = '/abs/a.pem'\nkey = 'a-key.pem'\n";
        let file = parse(Path::new("/data/context.toml"), text).unwrap();
        assert_eq!(file.ca, Path::new("/data/ca.pem"));
        assert_eq!(file.cert, Path::new("/abs/a.pem"));
    }

    #[test]
    fn a_context_may_say_where_processes_show_themselves() {
        let text = "control = ['h:1']\nca = 'a'\ncert = 'b'\nkey = 'c'\n[balancers]\nb1 = 'http://h:7411'\n";
        let file = parse(Path::new("x.toml"), text).unwrap();
        assert_eq!(file.balancers["b1"], "http://h:7411");
        assert!(file.agents.is_empty());
        assert_eq!(
            parse(Path::new("x.toml"), &toml::to_string(&file).unwrap()).unwrap(),
            file
        );
        assert!(parse(Path::new("x.toml"), &format!("{text}[engines]\n")).is_err());
    }

    #[test]
    fn an_unknown_key_in_a_context_is_named() {
        let error = parse(Path::new("x.toml"), "control = []\ncrt = 'x'\n").unwrap_err();
        assert!(error.to_string().contains("crt"), "{error}");
    }
}
