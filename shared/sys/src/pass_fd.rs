//! Descriptors over a Unix socket, each with one byte (`SCM_RIGHTS`, `unix(7)`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Sends `byte`, and `fd` with it if there is one.
///
/// # Errors
/// What `sendmsg(2)` says; a peer that is gone is `BrokenPipe`, not a signal.
pub fn send(socket: impl AsFd, byte: u8, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = fd.as_slice();
    if !descriptors.is_empty() {
        // The space is for one, and there is one.
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    sendmsg(socket, &[IoSlice::new(&[byte])], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives a byte, and the descriptor that came with it, if one did; `None` when the peer has closed its end.
///
/// # Errors
/// What `recvmsg(2)` says.
pub fn receive(socket: impl AsFd) -> io::Result<Option<(u8, Option<OwnedFd>)>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more than one descriptor with one byte"));
    }
    let mut descriptors = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let fd = descriptors.next().and_then(|mut descriptors| descriptors.next());
    let [byte] = byte;
    Ok((got.bytes > 0).then_some((byte, fd)))
}

/// Takes over what was inherited under `number`: it is closed with what is returned, or when another program is started.
///
/// # Errors
/// `EBADF` when nothing was; `InvalidInput` when it is closed on `exec`, as all is that this process has opened or taken
/// over.
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers only.
    match unsafe { libc::fcntl(number, libc::F_GETFD) } {
        -1 => return Err(io::Error::last_os_error()),
        flags if flags & libc::FD_CLOEXEC != 0 => {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a descriptor that was not inherited"));
        }
        _ => {}
    }
    // SAFETY: the descriptor is open. What this process opens is closed on `exec`, so this was inherited; and it was not
    // taken over before, which would have marked it so. Nobody else owns it.
    let taken = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&taken, rustix::io::FdFlags::CLOEXEC)?;
    Ok(taken)
}

/// Waits for the next message on the socket that was inherited under `number`, copies it to `buffer` and leaves it in
/// the socket; its length. The descriptor stays whoever's it is.
///
/// # Errors
/// What `recv(2)` says, `EBADF` and `ENOTSOCK` among it; `InvalidData` when the buffer is too short.
pub fn peek_inherited(number: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_PEEK | libc::MSG_TRUNC;
    // SAFETY: the kernel writes at most `buffer.len()` bytes to `buffer`; a number that is no socket is an error.
    let got = unsafe { libc::recv(number, buffer.as_mut_ptr().cast(), buffer.len(), flags) };
    match usize::try_from(got) {
        Ok(length) if length <= buffer.len() => Ok(length),
        Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "a message longer than is understood")),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_descriptor_arrives_with_its_byte() {
        let (here, there) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        send(&here, 7, Some(file.as_fd())).unwrap();
        send(&here, 8, None).unwrap();
        drop((here, file));
        let (byte, fd) = receive(&there).unwrap().unwrap();
        let mut copy = std::fs::File::from(fd.unwrap());
        copy.rewind().unwrap();
        let mut text = String::new();
        copy.read_to_string(&mut text).unwrap();
        assert_eq!((byte, text.as_str()), (7, "content"));
        assert!(matches!(receive(&there).unwrap(), Some((8, None))));
        assert!(receive(&there).unwrap().is_none());
    }

    #[test]
    fn a_peeked_message_is_still_there() {
        let (here, there) = std::os::unix::net::UnixDatagram::pair().unwrap();
        here.send(b"request").unwrap();
        let mut buffer = [0; 16];
        let number = std::os::fd::AsRawFd::as_raw_fd(&there);
        assert_eq!(peek_inherited(number, &mut buffer).unwrap(), 7);
        assert_eq!(&buffer[..7], b"request");
        assert!(peek_inherited(number, &mut buffer[..3]).is_err());
        assert_eq!(there.recv(&mut buffer).unwrap(), 7);
    }

    #[test]
    fn what_was_inherited_is_taken_over_once() {
        use std::os::fd::{AsRawFd, IntoRawFd};
        let (here, there) = UnixStream::pair().unwrap();
        assert_eq!(take_inherited(there.as_raw_fd()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        rustix::io::fcntl_setfd(&there, rustix::io::FdFlags::empty()).unwrap();
        let number = there.into_raw_fd();
        let taken = take_inherited(number).unwrap();
        assert!(take_inherited(number).is_err());
        drop(taken);
        assert_eq!(send(&here, 1, None).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_peer_that_is_gone_is_an_error() {
        let (here, there) = UnixStream::pair().unwrap();
        drop(there);
        assert_eq!(send(&here, 1, None).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
