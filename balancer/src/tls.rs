//! TLS on the client port: a certificate and key from files.
//!
//! New connections get the newest pair that could be read; those that stand keep theirs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

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

    /// The files to look at for changes.
    pub(crate) fn files(&self) -> [&Path; 2] {
        [&self.paths.cert, &self.paths.key]
    }

    /// Takes over what the files have by now; an error changes nothing.
    pub(crate) fn read_again(&self) -> Result<(), TlsError> {
        *self.config.write() = read(&self.paths)?;
        Ok(())
    }

    /// Greets a client; `None`: it does not speak TLS, or not in time.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        patience: Duration,
    ) -> Option<TlsStream<TcpStream>> {
        let config = self.config.read().clone();
        let greeting = TlsAcceptor::from(config).accept(stream);
        timeout(patience, greeting).await.ok()?.ok()
    }
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
