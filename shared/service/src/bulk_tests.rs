//! Both roles, over real connections on this machine.

use super::*;
use haulage_protocol::id::HostId;
use tokio::sync::mpsc;

const CARGO: Cargo = Cargo { role: "crates", failed: FrameKind(FrameKind::FIRST_OWN.0 + 2) };
const CRATE: FrameKind = FrameKind::FIRST_OWN;
const GOT_IT: FrameKind = FrameKind(FrameKind::FIRST_OWN.0 + 1);

/// Says that it has each crate, until one is spoilt.
struct Shelf {
    _dropped: mpsc::Sender<()>,
}

impl Receive for Shelf {
    async fn receive(self, connection: &mut BulkConnection) -> Result<(), Fault> {
        while let Some(frame) = connection.recv().await.map_err(|error| stream(&error))? {
            if frame.payload.as_ref() == b"spoilt" {
                return Err(Fault::new(FaultCode::known("spoilt"), "a crate is spoilt"));
            }
            send_now(connection, GOT_IT, frame.payload).await?;
        }
        Ok(())
    }
}

fn config() -> HostConfig {
    HostConfig {
        nats: crate::config::NatsConfig { nats: String::new() },
        host: "here".parse::<HostId>().unwrap(),
        state_dir: Default::default(),
        page_dir: Default::default(),
        docker: String::new(),
        bucket: String::new(),
        bulk_listen: ([127, 0, 0, 1], 0).into(),
        bulk_advertise: None,
    }
}

/// An open session, and what tells that its receiver is gone.
async fn opened(migration: &MigrationId, token: &Token) -> (Arrivals, mpsc::Receiver<()>) {
    let arrivals = Arrivals::bind(&config(), CARGO).await.unwrap();
    let (dropped, gone) = mpsc::channel(1);
    arrivals.open(migration.clone(), token, Shelf { _dropped: dropped }).unwrap();
    (arrivals, gone)
}

async fn connect(arrivals: &Arrivals, migration: &MigrationId, token: &Token) -> Result<Departure, Fault> {
    Departure::connect(&arrivals.address().to_string(), migration, token, CARGO).await
}

#[tokio::test]
async fn one_source_with_the_token_is_let_in_and_answered() {
    let (migration, token) = (MigrationId::generate(), Token::generate());
    let (arrivals, mut gone) = opened(&migration, &token).await;
    let stranger = connect(&arrivals, &migration, &Token::generate()).await.unwrap_err();
    assert_eq!(stranger.code.as_str(), "wrong_token");
    let mut source = connect(&arrivals, &migration, &token).await.unwrap();
    source.connection.send(CRATE, Bytes::from_static(b"apples")).await.unwrap();
    assert_eq!(source.answer(GOT_IT, "apples").await.unwrap().as_ref(), b"apples");
    assert!(source.traffic() > 0);
    let again = arrivals.open(migration.clone(), &token, Shelf { _dropped: mpsc::channel(1).0 });
    assert_eq!(again.unwrap_err().code.as_str(), "session_exists");
    arrivals.close(&migration).await;
    assert_eq!(gone.recv().await, None, "its receiver lives on");
    arrivals.close(&migration).await;
    let late = connect(&arrivals, &migration, &token).await.unwrap_err();
    assert_eq!(late.code.as_str(), "unknown_session");
}

/// How a source finds out that its target has given up.
#[derive(Debug, Clone, Copy)]
enum Finds {
    Waiting,
    Sending {
        crates_of: usize,
    },
    SendingAtOnce,
    /// With something in its buffer that cannot go any more.
    WaitingAfterAFailure,
}

#[tokio::test]
async fn a_target_that_gives_up_says_why_however_the_source_finds_out() {
    for finds in [
        Finds::Waiting,
        Finds::Sending { crates_of: 1 << 20 },
        Finds::Sending { crates_of: 1 },
        Finds::SendingAtOnce,
        Finds::WaitingAfterAFailure,
    ] {
        let (migration, token) = (MigrationId::generate(), Token::generate());
        let (arrivals, mut gone) = opened(&migration, &token).await;
        let mut source = connect(&arrivals, &migration, &token).await.unwrap();
        source.connection.send(CRATE, Bytes::from_static(b"spoilt")).await.unwrap();
        if !matches!(finds, Finds::Waiting) {
            source.connection.flush().await.unwrap();
            assert_eq!(gone.recv().await, None);
        }
        let one_more = || Bytes::from_static(b"pears");
        let fault = match finds {
            Finds::Waiting => source.answer(GOT_IT, "it").await.unwrap_err(),
            Finds::Sending { crates_of } => {
                let (crates, ready) = mpsc::channel(1);
                let giver = tokio::spawn(async move {
                    while crates.send(Bytes::from(vec![0; crates_of])).await.is_ok() {}
                });
                let fault = source.send_all(CRATE, ready).await.unwrap_err();
                giver.await.unwrap();
                fault
            }
            Finds::SendingAtOnce => loop {
                if let Err(fault) = source.send_now(CRATE, one_more()).await {
                    break fault;
                }
            },
            Finds::WaitingAfterAFailure => {
                while source.connection.flush().await.is_ok() {
                    source.connection.send(CRATE, one_more()).await.unwrap();
                }
                source.answer(GOT_IT, "it").await.unwrap_err()
            }
        };
        assert_eq!(fault.code.as_str(), "spoilt", "{finds:?}: {fault}");
        drop(arrivals);
    }
}
