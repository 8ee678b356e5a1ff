//! Messages of protobuf, field by field: what is changed in one must leave fields alone that we do not know.

/// Length-delimited, in a field's tag.
const BYTES: u64 = 2;

/// A field of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Field<'a> {
    pub(crate) number: u32,
    /// The bytes of a length-delimited one; of others nothing.
    pub(crate) content: &'a [u8],
    /// All of it, tag and length included.
    pub(crate) whole: &'a [u8],
}

/// The fields of a message, in their order; `None` when it is none.
pub(crate) fn fields(message: &[u8]) -> Option<Vec<Field<'_>>> {
    let mut rest = message;
    let mut all = Vec::new();
    while !rest.is_empty() {
        let field = rest;
        let tag = number(&mut rest)?;
        let content = match tag & 7 {
            0 => {
                number(&mut rest)?;
                &[][..]
            }
            1 => skip(&mut rest, 8).map(|_| &[][..])?,
            BYTES => {
                let length = number(&mut rest)?;
                skip(&mut rest, usize::try_from(length).ok()?)?
            }
            5 => skip(&mut rest, 4).map(|_| &[][..])?,
            _ => return None,
        };
        let whole = field.get(..field.len() - rest.len())?;
        all.push(Field { number: u32::try_from(tag >> 3).ok()?, content, whole });
    }
    Some(all)
}

/// Appends a length-delimited field.
pub(crate) fn append(message: &mut Vec<u8>, field: u32, content: &[u8]) {
    prost::encoding::encode_varint(u64::from(field) << 3 | BYTES, message);
    prost::encoding::encode_varint(content.len() as u64, message);
    message.extend_from_slice(content);
}

fn number(rest: &mut &[u8]) -> Option<u64> {
    prost::encoding::decode_varint(rest).ok()
}

fn skip<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (content, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, PartialEq, prost::Message)]
    struct Inner {
        #[prost(uint64, required, tag = "1")]
        number: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    struct Outer {
        #[prost(uint64, required, tag = "1")]
        plain: u64,
        #[prost(fixed32, optional, tag = "3")]
        four: Option<u32>,
        #[prost(message, repeated, tag = "14")]
        inner: Vec<Inner>,
        #[prost(double, optional, tag = "300")]
        eight: Option<f64>,
    }

    proptest! {
        #[test]
        fn fields_make_up_the_message(
            plain in any::<u64>(),
            four in any::<Option<u32>>(),
            inner in prop::collection::vec(any::<u64>(), 0..6),
            eight in prop::option::of(0.0..1.0_f64),
        ) {
            use prost::Message;
            let inner: Vec<_> = inner.into_iter().map(|number| Inner { number }).collect();
            let outer = Outer { plain, four, inner: inner.clone(), eight };
            let bytes = outer.encode_to_vec();
            let fields = fields(&bytes).unwrap();
            let joined: Vec<u8> = fields.iter().flat_map(|field| field.whole.to_vec()).collect();
            prop_assert_eq!(&joined, &bytes);
            let mut again = Vec::new();
            for field in fields.iter().filter(|field| field.number == 14) {
                append(&mut again, 14, field.content);
            }
            prop_assert_eq!(Outer::decode(&again[..]).unwrap().inner, inner);
        }

        #[test]
        fn garbage_is_none_or_whole(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            if let Some(fields) = fields(&bytes) {
                prop_assert_eq!(fields.iter().map(|field| field.whole.len()).sum::<usize>(), bytes.len());
            }
        }
    }
}
