//! The stream over real sockets, with peers that behave and peers that do not.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::frame::Header;
use super::*;

const DATA: FrameKind = FrameKind(0x0101);
const ACK: FrameKind = FrameKind(0x0102);
const SOON: Duration = Duration::from_secs(10);

fn key() -> SessionKey {
    SessionKey::new("0190-test", "files")
}

async fn listener() -> BulkListener {
    BulkListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await.unwrap()
}

/// A listener with one open session, and the greeting that joins it.
async fn open() -> (BulkListener, BulkSession, Hello) {
    let listener = listener().await;
    let token = Token::generate().unwrap();
    let session = listener.open(key(), token.clone()).unwrap();
    (listener, session, Hello { session: key(), token })
}

async fn pair() -> (BulkListener, BulkSession, BulkConnection, BulkConnection) {
    let (listener, mut session, hello) = open().await;
    let near = BulkConnection::connect(listener.local_addr(), &hello).await.unwrap();
    let far = timeout(SOON, session.accept()).await.unwrap().unwrap();
    (listener, session, near, far)
}

/// What the listener answers to raw bytes, until it closes.
async fn answer_to(listener: &BulkListener, bytes: &[u8], close: bool) -> Vec<u8> {
    let mut socket = TcpStream::connect(listener.local_addr()).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    if close {
        socket.shutdown().await.unwrap();
    }
    let mut answer = Vec::new();
    timeout(SOON, socket.read_to_end(&mut answer)).await.unwrap().unwrap();
    answer
}

/// The code inside a refusal frame.
fn refusal(answer: &[u8]) -> String {
    let header = Header::decode(answer.first_chunk().unwrap(), 4096).unwrap();
    let frame = header.accept(Bytes::copy_from_slice(&answer[HEADER_BYTES..])).unwrap();
    assert_eq!(frame.kind, FrameKind::REFUSED);
    match hello::Refusal::decode(&frame.payload) {
        StreamError::Refused { code, .. } => code,
        other => panic!("not a refusal: {other}"),
    }
}

fn raw_frame(kind: FrameKind, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Header::of(kind, 0, payload).unwrap().encode().to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

#[tokio::test]
async fn frames_arrive_in_order_and_are_counted_on_both_sides() {
    let (_listener, _session, mut near, mut far) = pair().await;
    let large = Bytes::from(vec![0xa5; MAX_PAYLOAD_BYTES]);
    let sending = tokio::spawn({
        let large = large.clone();
        async move {
            for round in 0..20u8 {
                near.send(DATA, Bytes::from(vec![round; 10])).await.unwrap();
                near.send(DATA, large.clone()).await.unwrap();
            }
            near.finish().await.unwrap();
            let total = near.recv().await.unwrap().unwrap();
            assert_eq!(total.kind, ACK);
            (near.sent_bytes(), near.received_bytes(), total.payload)
        }
    });
    let mut payload = 0;
    let mut round = 0;
    while let Some(frame) = far.recv().await.unwrap() {
        assert_eq!(frame.kind, DATA);
        payload += frame.payload.len();
        match frame.payload.len() {
            10 => assert_eq!(frame.payload, vec![round / 2; 10]),
            _ => assert_eq!(frame.payload, large),
        }
        round += 1;
    }
    assert_eq!(round, 40);
    assert!(far.recv().await.unwrap().is_none(), "the end stays the end");
    far.send(ACK, Bytes::from(payload.to_string())).await.unwrap();
    far.finish().await.unwrap();

    let (sent, received, total) = sending.await.unwrap();
    assert_eq!(total, payload.to_string().as_bytes());
    assert_eq!(far.received_bytes(), sent);
    assert_eq!(received, HEADER_BYTES as u64 + (HEADER_BYTES + total.len()) as u64);
    assert_eq!(far.sent_bytes(), received + HEADER_BYTES as u64, "the end frame is not read by expect");
}

#[tokio::test]
async fn several_connections_join_one_session() {
    let (listener, mut session, hello) = open().await;
    let mut near = Vec::new();
    for _ in 0..4 {
        near.push(BulkConnection::connect(listener.local_addr(), &hello).await.unwrap());
    }
    for _ in 0..4 {
        let far = timeout(SOON, session.accept()).await.unwrap().unwrap();
        assert!(near.iter().any(|c| c.peer() == listener.local_addr()));
        assert_eq!(far.session(), &key());
    }
    assert_eq!(listener.refusals(), Refusals::default());
}

#[tokio::test]
async fn a_wrong_token_is_refused_and_the_session_goes_on() {
    let (listener, mut session, hello) = open().await;
    let wrong = Hello { session: key(), token: Token::generate().unwrap() };
    let error = BulkConnection::connect(listener.local_addr(), &wrong).await.unwrap_err();
    assert_eq!(error.code(), "wrong_token");
    assert_eq!(listener.refusals().of("wrong_token"), 1);

    BulkConnection::connect(listener.local_addr(), &hello).await.unwrap();
    assert!(timeout(SOON, session.accept()).await.unwrap().is_some());
    assert_eq!(listener.refusals().total(), 1);
}

#[tokio::test]
async fn a_session_which_is_not_open_or_no_longer_is_refused() {
    let (listener, session, hello) = open().await;
    let other = Hello { session: SessionKey::new("0190-test", "pages"), token: hello.token.clone() };
    let error = BulkConnection::connect(listener.local_addr(), &other).await.unwrap_err();
    assert_eq!(error.code(), "unknown_session");
    assert!(matches!(listener.open(key(), hello.token.clone()), Err(StreamError::SessionExists { .. })));

    drop(session);
    let error = BulkConnection::connect(listener.local_addr(), &hello).await.unwrap_err();
    assert_eq!(error.code(), "unknown_session");
    assert!(listener.open(key(), hello.token).is_ok(), "the name is free again");
}

#[tokio::test]
async fn connections_nobody_takes_are_refused_not_heaped_up() {
    let (listener, _session, hello) = open().await;
    let mut waiting = Vec::new();
    let refused = loop {
        match BulkConnection::connect(listener.local_addr(), &hello).await {
            Ok(connection) => waiting.push(connection),
            Err(error) => break error,
        }
        assert!(waiting.len() <= 64, "there is a bound");
    };
    assert_eq!(refused.code(), "session_busy");
}

#[tokio::test]
async fn garbage_is_refused() {
    let (listener, _session, _) = open().await;
    let answer = answer_to(&listener, b"GET / HTTP/1.1\r\nHost: example\r\n\r\n", false).await;
    assert_eq!(refusal(&answer), "bad_magic");
    assert_eq!(listener.refusals().of("bad_magic"), 1);
}

#[tokio::test]
async fn a_foreign_version_is_refused() {
    let (listener, _session, hello) = open().await;
    let mut payload = hello.encode().unwrap().to_vec();
    payload[0..2].copy_from_slice(&7u16.to_le_bytes());
    let answer = answer_to(&listener, &raw_frame(FrameKind::HELLO, &payload), false).await;
    assert_eq!(refusal(&answer), "bad_version");
}

#[tokio::test]
async fn a_greeting_that_cannot_be_read_is_refused() {
    let (listener, _session, _) = open().await;
    let answer = answer_to(&listener, &raw_frame(FrameKind::HELLO, b"\x01\x00{}"), false).await;
    assert_eq!(refusal(&answer), "bad_hello");
    let answer = answer_to(&listener, &raw_frame(DATA, b"data before any greeting"), false).await;
    assert_eq!(refusal(&answer), "bad_hello");
}

#[tokio::test]
async fn a_huge_greeting_is_refused_unread() {
    let (listener, _session, _) = open().await;
    let mut bytes = raw_frame(FrameKind::HELLO, b"");
    bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(refusal(&answer_to(&listener, &bytes, false).await), "frame_too_large");
}

#[tokio::test]
async fn a_damaged_greeting_is_refused() {
    let (listener, _session, hello) = open().await;
    let mut bytes = raw_frame(FrameKind::HELLO, &hello.encode().unwrap());
    *bytes.last_mut().unwrap() ^= 1;
    assert_eq!(refusal(&answer_to(&listener, &bytes, false).await), "checksum_mismatch");
}

#[tokio::test]
async fn a_greeting_cut_off_is_refused() {
    let (listener, _session, hello) = open().await;
    let bytes = raw_frame(FrameKind::HELLO, &hello.encode().unwrap());
    assert_eq!(refusal(&answer_to(&listener, &bytes[..30], true).await), "truncated");
    assert_eq!(refusal(&answer_to(&listener, &bytes[..3], true).await), "truncated");
}

#[tokio::test]
async fn a_silent_peer_is_refused_and_holds_up_nobody() {
    let (listener, mut session, hello) = open().await;
    let mut silent = TcpStream::connect(listener.local_addr()).await.unwrap();
    BulkConnection::connect(listener.local_addr(), &hello).await.unwrap();
    assert!(timeout(SOON, session.accept()).await.unwrap().is_some());

    let mut answer = Vec::new();
    timeout(SOON, silent.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(refusal(&answer), "timeout");
    assert_eq!(listener.refusals().of("timeout"), 1);
}

#[tokio::test]
async fn a_stream_without_its_end_is_truncated() {
    let (_listener, _session, mut near, mut far) = pair().await;
    near.send(DATA, Bytes::from_static(b"half of it")).await.unwrap();
    near.flush().await.unwrap();
    drop(near);
    assert!(far.recv().await.unwrap().is_some());
    assert!(matches!(far.recv().await, Err(StreamError::Truncated)));
}

/// A peer that is let in, then sends these bytes and closes.
async fn after_joining(bytes: &[u8]) -> StreamError {
    let (listener, mut session, hello) = open().await;
    let mut socket = TcpStream::connect(listener.local_addr()).await.unwrap();
    socket.write_all(&raw_frame(FrameKind::HELLO, &hello.encode().unwrap())).await.unwrap();
    let mut far = timeout(SOON, session.accept()).await.unwrap().unwrap();
    socket.write_all(bytes).await.unwrap();
    socket.shutdown().await.unwrap();
    timeout(SOON, far.recv()).await.unwrap().unwrap_err()
}

#[tokio::test]
async fn what_goes_wrong_after_joining_is_told_apart() {
    let good = raw_frame(DATA, b"payload");
    let mut large = good.clone();
    large[8..12].copy_from_slice(&(MAX_PAYLOAD_BYTES as u32 + 1).to_le_bytes());
    let mut damaged = good.clone();
    damaged[HEADER_BYTES] ^= 0x80;

    assert_eq!(after_joining(&good[..good.len() - 1]).await.code(), "truncated");
    assert_eq!(after_joining(&good[..7]).await.code(), "truncated");
    assert_eq!(after_joining(b"").await.code(), "truncated");
    assert_eq!(after_joining(b"0123456789abcdef").await.code(), "bad_magic");
    assert_eq!(after_joining(&large).await.code(), "frame_too_large");
    assert_eq!(after_joining(&damaged).await.code(), "checksum_mismatch");
    assert_eq!(after_joining(&raw_frame(FrameKind::WELCOME, b"")).await.code(), "unexpected_frame");
}

#[tokio::test]
async fn a_listener_that_is_gone_leaves_its_connections_alone() {
    let (listener, session, mut near, mut far) = pair().await;
    let addr = listener.local_addr();
    drop((listener, session));
    near.send(DATA, Bytes::from_static(b"still here")).await.unwrap();
    near.flush().await.unwrap();
    assert_eq!(far.recv().await.unwrap().unwrap().payload, "still here");

    let hello = Hello { session: key(), token: Token::generate().unwrap() };
    let deadline = tokio::time::Instant::now() + SOON;
    while BulkConnection::connect(addr, &hello).await.unwrap_err().code() != "io" {
        assert!(tokio::time::Instant::now() < deadline, "the listener still answers");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn own_kinds_only_and_no_oversized_frames() {
    let (_listener, _session, mut near, _far) = pair().await;
    let before = near.sent_bytes();
    assert_eq!(near.send(FrameKind::END, Bytes::new()).await.unwrap_err().code(), "unexpected_frame");
    let huge = Bytes::from(vec![0; MAX_PAYLOAD_BYTES + 1]);
    assert_eq!(near.send(DATA, huge).await.unwrap_err().code(), "frame_too_large");
    assert_eq!(near.sent_bytes(), before);
}
