//! TLS on the client port: a certificate and key from files, read again when they change.
//!
//! New connections get the newest pair; those that stand keep theirs. A pair that cannot be used is
//! said once and changes nothing.
#![allow(clippy::disallowed_methods)] // the rim: this is where files are looked at and time passes

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio::time::{interval, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// From the connection to the end of the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Where certificate and key are, as PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsPaths {
    /// The certificate, then those that signed it.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Why a certificate and a key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file has no PEM of the kind, or cannot be read.
    #[error("cannot use {path} for TLS: {problem}; give PEM files by --tls-cert and --tls-key")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// They do not belong together, or are of a kind that is not supported.
    #[error("the certificate {cert} and the key {key} cannot be used together: {problem}")]
    Pair {
        /// The certificate.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
        /// What is wrong.
        problem: rustls::Error,
    },
}

/// The pair in use.
pub(crate) struct Tls {
    paths: TlsPaths,
    config: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    pub(crate) fn load(paths: &TlsPaths) -> Result<Self, TlsError> {
        Ok(Self {
            config: RwLock::new(read(paths)?),
            paths: paths.clone(),
        })
    }

    /// Greets a client; `None`: it does not speak TLS, or not in time.
    pub(crate) async fn accept(&self, stream: TcpStream) -> Option<TlsStream<TcpStream>> {
        let config = self.config.read().clone();
        let greeting = TlsAcceptor::from(config).accept(stream);
        timeout(HANDSHAKE_TIMEOUT, greeting).await.ok()?.ok()
    }

    /// Reads the files again whenever one has changed, until it is dropped.
    pub(crate) async fn watch(self: Arc<Self>) {
        let mut seen = changed(&self.paths);
        let mut looks = interval(LOOK_EVERY);
        loop {
            looks.tick().await;
            let now = changed(&self.paths);
            if now == seen {
                continue;
            }
            match read(&self.paths) {
                Ok(config) => {
                    *self.config.write() = config;
                    seen = now;
                    tracing::info!(cert = %self.paths.cert.display(), "a new TLS certificate is in use");
                }
                Err(error) => {
                    // Perhaps only one of both is written yet: looked at again when it changes.
                    if now != seen {
                        tracing::warn!(%error, "the TLS certificate stays the old one");
                    }
                    seen = now;
                }
            }
        }
    }
}

type Changed = [Option<SystemTime>; 2];

fn changed(paths: &TlsPaths) -> Changed {
    let of = |path: &Path| {
        std::fs::metadata(path)
            .and_then(|file| file.modified())
            .ok()
    };
    [of(&paths.cert), of(&paths.key)]
}

fn read(paths: &TlsPaths) -> Result<Arc<ServerConfig>, TlsError> {
    let wrong = |path: &Path, problem: String| TlsError::File {
        path: path.into(),
        problem,
    };
    let certificates = CertificateDer::pem_file_iter(&paths.cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| wrong(&paths.cert, error.to_string()))?;
    if certificates.is_empty() {
        return Err(wrong(&paths.cert, "there is no certificate in it".into()));
    }
    let key = PrivateKeyDer::from_pem_file(&paths.key)
        .map_err(|error| wrong(&paths.key, error.to_string()))?;
    let pair = |problem| TlsError::Pair {
        cert: paths.cert.clone(),
        key: paths.key.clone(),
        problem,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(pair)?
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .map_err(pair)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
