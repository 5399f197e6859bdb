//! The text of a trace file: gzip is unpacked, a byte order mark dropped, and what is neither is named.

use std::io::{self, BufRead, BufReader, Cursor, Read};

use flate2::bufread::MultiGzDecoder;

/// Bytes from which the kind of a file is told.
const HEAD: u64 = 6;
/// What files begin with that are no text, and what they are.
const FOREIGN: [(&[u8], &str); 8] = [
    (b"\xff\xfe", "UTF-16 text; write it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; write it as UTF-8"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it, or use gzip"),
    (b"BZh", "compressed with bzip2; unpack it, or use gzip"),
    (b"\xfd7zXZ\x00", "compressed with xz; unpack it, or use gzip"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"PAR1", "a Parquet file; write it as JSON lines"),
    (b"\x1f\x8b", "compressed twice; unpack it once"),
];

/// Lines of UTF-8 from the bytes of a file. The inner error says what the file is in place of a trace.
pub(super) fn text<'a>(reader: impl BufRead + 'a) -> io::Result<Result<Box<dyn BufRead + 'a>, &'static str>> {
    let (head, rest) = begin(reader)?;
    if head.starts_with(b"\x1f\x8b") {
        let unpacked = BufReader::new(MultiGzDecoder::new(Cursor::new(head).chain(rest)));
        let (head, rest) = begin(unpacked)?;
        return Ok(plain(head, rest));
    }
    Ok(plain(head, rest))
}

fn begin<R: BufRead>(mut reader: R) -> io::Result<(Vec<u8>, R)> {
    let mut head = Vec::new();
    reader.by_ref().take(HEAD).read_to_end(&mut head)?;
    Ok((head, reader))
}

fn plain<'a>(mut head: Vec<u8>, rest: impl BufRead + 'a) -> Result<Box<dyn BufRead + 'a>, &'static str> {
    if let Some((_, what)) = FOREIGN.iter().find(|(bytes, _)| head.starts_with(bytes)) {
        return Err(what);
    }
    if head.starts_with(b"\xef\xbb\xbf") {
        head.drain(..3);
    }
    Ok(Box::new(Cursor::new(head).chain(rest)))
}
