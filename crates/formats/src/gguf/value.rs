//! Metadata values: single ones, and lists that take no more memory than they do in the file.

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Unsigned 8 bits.
    U8(u8),
    /// Signed 8 bits.
    I8(i8),
    /// Unsigned 16 bits.
    U16(u16),
    /// Signed 16 bits.
    I16(i16),
    /// Unsigned 32 bits.
    U32(u32),
    /// Signed 32 bits.
    I32(i32),
    /// 32-bit float.
    F32(f32),
    /// True or false.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Unsigned 64 bits.
    U64(u64),
    /// Signed 64 bits.
    I64(i64),
    /// 64-bit float.
    F64(f64),
    /// Values of one type.
    Array(Array),
}

/// A list of values of one type. Lists of lists, which the format allows, are read neither by ggml nor here.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    /// Unsigned 8 bits.
    U8(Vec<u8>),
    /// Signed 8 bits.
    I8(Vec<i8>),
    /// Unsigned 16 bits.
    U16(Vec<u16>),
    /// Signed 16 bits.
    I16(Vec<i16>),
    /// Unsigned 32 bits.
    U32(Vec<u32>),
    /// Signed 32 bits.
    I32(Vec<i32>),
    /// 32-bit floats.
    F32(Vec<f32>),
    /// True or false.
    Bool(Vec<bool>),
    /// UTF-8 texts.
    Texts(Texts),
    /// Unsigned 64 bits.
    U64(Vec<u64>),
    /// Signed 64 bits.
    I64(Vec<i64>),
    /// 64-bit floats.
    F64(Vec<f64>),
}

/// Texts in one piece of memory: a vocabulary has a hundred thousand, mostly of a few letters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Texts {
    joined: String,
    ends: Vec<usize>,
}

/// Does the same with the vector of any variant.
macro_rules! each {
    ($array:expr, $v:ident => $body:expr, $t:ident => $texts:expr) => {
        match $array {
            Array::U8($v) => $body,
            Array::I8($v) => $body,
            Array::U16($v) => $body,
            Array::I16($v) => $body,
            Array::U32($v) => $body,
            Array::I32($v) => $body,
            Array::F32($v) => $body,
            Array::Bool($v) => $body,
            Array::U64($v) => $body,
            Array::I64($v) => $body,
            Array::F64($v) => $body,
            Array::Texts($t) => $texts,
        }
    };
}

impl Value {
    /// A whole number from 0 on, whatever its width.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Value::U8(v) => Some((*v).into()),
            Value::U16(v) => Some((*v).into()),
            Value::U32(v) => Some((*v).into()),
            Value::U64(v) => Some(*v),
            Value::I8(v) => (*v).try_into().ok(),
            Value::I16(v) => (*v).try_into().ok(),
            Value::I32(v) => (*v).try_into().ok(),
            Value::I64(v) => (*v).try_into().ok(),
            _ => None,
        }
    }

    /// A number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::F32(v) => Some((*v).into()),
            Value::F64(v) => Some(*v),
            Value::I8(v) => Some((*v).into()),
            Value::I16(v) => Some((*v).into()),
            Value::I32(v) => Some((*v).into()),
            Value::I64(v) => Some(*v as f64),
            other => other.as_u64().map(|v| v as f64),
        }
    }

    /// A text.
    pub fn as_str(&self) -> Option<&str> {
        if let Value::String(s) = self { Some(s) } else { None }
    }

    /// True or false.
    pub fn as_bool(&self) -> Option<bool> {
        if let Value::Bool(b) = self { Some(*b) } else { None }
    }

    /// A list.
    pub fn as_array(&self) -> Option<&Array> {
        if let Value::Array(a) = self { Some(a) } else { None }
    }

    /// The format's number of the type.
    pub(super) fn type_id(&self) -> u32 {
        match self {
            Value::U8(_) => 0,
            Value::I8(_) => 1,
            Value::U16(_) => 2,
            Value::I16(_) => 3,
            Value::U32(_) => 4,
            Value::I32(_) => 5,
            Value::F32(_) => 6,
            Value::Bool(_) => 7,
            Value::String(_) => 8,
            Value::Array(_) => 9,
            Value::U64(_) => 10,
            Value::I64(_) => 11,
            Value::F64(_) => 12,
        }
    }
}

impl Array {
    /// How many values it has.
    pub fn len(&self) -> usize {
        each!(self, v => v.len(), t => t.len())
    }

    /// Has it none?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The value at a place.
    pub fn get(&self, i: usize) -> Option<Value> {
        each!(self, v => v.get(i).copied().map(Value::from), t => t.get(i).map(|s| Value::String(s.into())))
    }

    /// The values one by one.
    pub fn iter(&self) -> impl Iterator<Item = Value> + '_ {
        (0..self.len()).filter_map(|i| self.get(i))
    }

    /// Its texts, if it is a list of texts.
    pub fn as_texts(&self) -> Option<&Texts> {
        if let Array::Texts(t) = self { Some(t) } else { None }
    }

    /// Its numbers, if it is a list of numbers.
    pub fn to_f64(&self) -> Option<Vec<f64>> {
        if self.is_empty() { Some(Vec::new()) } else { self.iter().map(|v| v.as_f64()).collect() }
    }

    /// Its whole numbers, if all are from 0 on.
    pub fn to_u64(&self) -> Option<Vec<u64>> {
        if self.is_empty() { Some(Vec::new()) } else { self.iter().map(|v| v.as_u64()).collect() }
    }

    /// The format's number of the elements' type.
    pub(super) fn type_id(&self) -> u32 {
        match self {
            Array::U8(_) => 0,
            Array::I8(_) => 1,
            Array::U16(_) => 2,
            Array::I16(_) => 3,
            Array::U32(_) => 4,
            Array::I32(_) => 5,
            Array::F32(_) => 6,
            Array::Bool(_) => 7,
            Array::Texts(_) => 8,
            Array::U64(_) => 10,
            Array::I64(_) => 11,
            Array::F64(_) => 12,
        }
    }
}

impl Texts {
    /// How many texts.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The text at a place.
    pub fn get(&self, i: usize) -> Option<&str> {
        let end = *self.ends.get(i)?;
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        self.joined.get(start..end)
    }

    /// The texts one by one.
    pub fn iter(&self) -> impl Iterator<Item = &str> + '_ {
        (0..self.len()).filter_map(|i| self.get(i))
    }

    /// Adds a text.
    pub fn push(&mut self, text: &str) {
        self.joined.push_str(text);
        self.ends.push(self.joined.len());
    }
}

impl<S: AsRef<str>> FromIterator<S> for Texts {
    fn from_iter<I: IntoIterator<Item = S>>(texts: I) -> Texts {
        let mut all = Texts::default();
        texts.into_iter().for_each(|t| all.push(t.as_ref()));
        all
    }
}

/// A value and a list from the plain types.
macro_rules! plain {
    ($($ty:ty => $variant:ident),*) => {
        $(
            impl From<$ty> for Value {
                fn from(v: $ty) -> Value {
                    Value::$variant(v)
                }
            }
            impl From<Vec<$ty>> for Value {
                fn from(list: Vec<$ty>) -> Value {
                    Value::Array(Array::$variant(list))
                }
            }
        )*
    };
}

plain!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, f32 => F32, bool => Bool, u64 => U64,
       i64 => I64, f64 => F64);

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::String(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::String(text)
    }
}

impl From<Texts> for Value {
    fn from(texts: Texts) -> Value {
        Value::Array(Array::Texts(texts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_keep_their_borders() {
        let texts: Texts = ["", "a\u{e9}", "", "b"].into_iter().collect();
        assert_eq!(texts.iter().collect::<Vec<_>>(), ["", "a\u{e9}", "", "b"]);
        assert_eq!((texts.get(1), texts.get(4)), (Some("a\u{e9}"), None));
    }

    #[test]
    fn numbers_of_any_width_are_numbers() {
        assert_eq!(Value::from(-3i64).as_f64(), Some(-3.0));
        assert_eq!(Value::from(-3i8).as_u64(), None);
        assert_eq!(Array::I16(vec![1, 2]).to_u64(), Some(vec![1, 2]));
        assert_eq!(Array::I16(vec![1, -2]).to_u64(), None);
        assert_eq!(Array::Bool(vec![true]).to_f64(), None);
    }
}
