//! A GGUF file in the making, every field of which can be wrong.

use crate::cases::{Case, accepted, refused};

/// The format's numbers of value types.
pub const U8: u32 = 0;
pub const U32: u32 = 4;
pub const BOOL: u32 = 7;
pub const TEXT: u32 = 8;
pub const LIST: u32 = 9;
/// ggml's numbers of tensor types.
pub const F32: u32 = 0;
pub const Q4_0: u32 = 2;

/// The fields, in order.
pub struct Draft {
    pub magic: [u8; 4],
    pub version: u32,
    pub keys: Vec<Vec<u8>>,
    pub tensors: Vec<Vec<u8>>,
    pub key_count: Option<u64>,
    pub tensor_count: Option<u64>,
    pub align: usize,
    pub data: usize,
}

/// An empty file of version 3.
pub fn draft() -> Draft {
    Draft {
        magic: *b"GGUF",
        version: 3,
        keys: Vec::new(),
        tensors: Vec::new(),
        key_count: None,
        tensor_count: None,
        align: 32,
        data: 0,
    }
}

pub fn text(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()
}

pub fn list(kind: u32, count: u64, payload: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &count.to_le_bytes(), payload].concat()
}

impl Draft {
    pub fn key(self, name: impl AsRef<[u8]>, kind: u32, value: impl AsRef<[u8]>) -> Draft {
        self.raw_key([&text(name)[..], &kind.to_le_bytes(), value.as_ref()].concat())
    }

    pub fn raw_key(mut self, bytes: impl Into<Vec<u8>>) -> Draft {
        self.keys.push(bytes.into());
        self
    }

    /// A tensor; `ne` innermost first, as in the file.
    pub fn tensor(self, name: impl AsRef<[u8]>, ne: &[u64], kind: u32, offset: u64) -> Draft {
        let mut bytes = text(name);
        bytes.extend((ne.len() as u32).to_le_bytes());
        ne.iter().for_each(|d| bytes.extend(d.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        self.raw_tensor(bytes)
    }

    pub fn raw_tensor(mut self, bytes: Vec<u8>) -> Draft {
        self.tensors.push(bytes);
        self
    }

    pub fn version(self, version: u32) -> Draft {
        Draft { version, ..self }
    }

    pub fn counts(self, tensors: u64, keys: u64) -> Draft {
        Draft { tensor_count: Some(tensors), key_count: Some(keys), ..self }
    }

    pub fn align(self, align: usize) -> Draft {
        Draft { align, ..self }
    }

    pub fn data(self, data: usize) -> Draft {
        Draft { data, ..self }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.key_count.unwrap_or(self.keys.len() as u64).to_le_bytes());
        self.keys.iter().chain(&self.tensors).for_each(|part| out.extend(part));
        if self.data > 0 {
            out.resize(out.len().next_multiple_of(self.align) + self.data, 7);
        }
        out
    }
}

pub fn no(what: &'static str, draft: Draft, words: &'static [&'static str]) -> Case {
    refused(what, draft.bytes(), words)
}

pub fn yes(what: &'static str, draft: Draft, why: &'static str) -> Case {
    accepted(what, draft.bytes(), why)
}

pub fn long_text() -> Vec<u8> {
    (1u64 << 50).to_le_bytes().to_vec()
}
