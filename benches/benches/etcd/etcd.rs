//! Three etcd members, and clients that put values.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::VALUE_BYTES;
use forebay_benches::servers::{Servers, free_ports};

/// One client.
pub(crate) struct Client {
    connection: SendRequest<Full<Bytes>>,
    key: String,
    writes: u64,
}

#[derive(Clone, PartialEq, Message)]
struct Put {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct Header {
    #[prost(uint64, tag = "2")]
    member_id: u64,
}

#[derive(Clone, PartialEq, Message)]
struct Empty {}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

impl Client {
    async fn connect(tls: &TlsConnector, port: u16) -> Option<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        stream.set_nodelay(true).unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let stream = tls.connect(name, stream).await.ok()?;
        let shake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (connection, driver) = shake.await.ok()?;
        tokio::spawn(driver);
        Some(Self {
            connection,
            key: String::new(),
            writes: 0,
        })
    }

    pub(crate) async fn write(&mut self) {
        self.writes += 1;
        let mut value = format!("{:020}", self.writes).into_bytes();
        value.resize(VALUE_BYTES, b'x');
        let put = Put {
            key: self.key.clone().into(),
            value: value.into(),
        };
        self.call::<Empty>("KV/Put", &put).await.unwrap();
    }

    /// One unary call of gRPC.
    async fn call<R: Message + Default>(
        &mut self,
        method: &str,
        message: &impl Message,
    ) -> Result<R, String> {
        let mut body = BytesMut::with_capacity(5 + message.encoded_len());
        body.put_u8(0);
        body.put_u32(message.encoded_len().try_into().unwrap());
        message.encode(&mut body).unwrap();
        let request = hyper::Request::post(format!("https://127.0.0.1/etcdserverpb.{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(body.freeze()))
            .unwrap();
        let response = self.connection.send_request(request).await;
        let response = response.map_err(|error| error.to_string())?;
        let body = response.into_body().collect().await;
        let body = body.map_err(|error| error.to_string())?;
        let status = body
            .trailers()
            .and_then(|trailers| trailers.get("grpc-status"));
        if status.is_none_or(|status| status != "0") {
            return Err(format!("{method}: {:?}", body.trailers()));
        }
        let bytes = body.to_bytes();
        R::decode(bytes.slice(5..)).map_err(|error| error.to_string())
    }
}

struct Pki {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

impl Pki {
    /// An authority, and a certificate for everybody, good at both ends of a connection.
    fn create(dir: &Path) -> Self {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_key = KeyPair::generate().unwrap();
        let root = authority.self_signed(&authority_key).unwrap();
        let mut leaf = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        leaf.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let leaf_key = KeyPair::generate().unwrap();
        let issuer = Issuer::new(authority, authority_key);
        let leaf = leaf.signed_by(&leaf_key, &issuer).unwrap();
        let write = |name: &str, pem: String| {
            let path = dir.join(name);
            std::fs::write(&path, pem).unwrap();
            path
        };
        Self {
            ca: write("etcd-ca.pem", root.pem()),
            cert: write("etcd.pem", leaf.pem()),
            key: write("etcd-key.pem", leaf_key.serialize_pem()),
        }
    }

    fn connector(&self) -> TlsConnector {
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(&self.ca).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(&self.cert).unwrap()],
                PrivateKeyDer::from_pem_file(&self.key).unwrap(),
            )
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        TlsConnector::from(Arc::new(config))
    }
}

/// Starts the members, and clients that take turns on so many connections.
pub(crate) async fn start(
    program: &Path,
    dir: &Path,
    (clients, connections): (usize, usize),
) -> (Servers, Vec<Client>) {
    let pki = Pki::create(dir);
    let (ports, peers) = (free_ports::<3>(), free_ports::<3>());
    let cluster = peers.iter().zip(1..);
    let cluster = cluster.map(|(port, number)| format!("e{number}=https://127.0.0.1:{port}"));
    let cluster = cluster.collect::<Vec<_>>().join(",");
    let members = ports
        .iter()
        .zip(peers)
        .zip(1..)
        .map(|((port, peer), number)| {
            let (url, peer) = (
                format!("https://127.0.0.1:{port}"),
                format!("https://127.0.0.1:{peer}"),
            );
            let mut member = Command::new(program);
            member.args(["--name", &format!("e{number}"), "--data-dir"]);
            member.arg(dir.join(format!("e{number}")));
            member.args([
                "--listen-client-urls",
                &url,
                "--advertise-client-urls",
                &url,
            ]);
            member.args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ]);
            member.args([
                "--initial-cluster",
                &cluster,
                "--initial-cluster-state",
                "new",
            ]);
            member.args(["--client-cert-auth", "--peer-client-cert-auth"]);
            for (side, ca) in [
                ("", "--trusted-ca-file"),
                ("peer-", "--peer-trusted-ca-file"),
            ] {
                member.arg(ca).arg(&pki.ca);
                member.arg(format!("--{side}cert-file")).arg(&pki.cert);
                member.arg(format!("--{side}key-file")).arg(&pki.key);
            }
            member.args(["--logger", "zap", "--log-level", "error"]);
            member.stderr(Stdio::null());
            member
        });
    let members = Servers::start(members);
    let tls = pki.connector();
    let leader = leader(&tls, &ports).await;
    let mut connected = vec![];
    for _ in 0..connections.clamp(1, clients) {
        connected.push(Client::connect(&tls, leader).await.unwrap().connection);
    }
    let mut writers = vec![];
    for (number, connection) in (0..clients).zip(connected.iter().cycle()) {
        let mut client = Client {
            connection: connection.clone(),
            key: format!("bench/w{number}"),
            writes: 0,
        };
        client.write().await;
        writers.push(client);
    }
    (members, writers)
}

/// The port of the member that leads, once one does.
async fn leader(tls: &TlsConnector, ports: &[u16]) -> u16 {
    for _ in 0..200 {
        for port in ports {
            let Some(mut client) = Client::connect(tls, *port).await else {
                continue;
            };
            let status = client.call::<Status>("Maintenance/Status", &Empty {}).await;
            if let Ok(status) = status
                && status.leader != 0
                && status
                    .header
                    .is_some_and(|own| own.member_id == status.leader)
            {
                return *port;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("no member of etcd leads");
}
