//! The vocabulary of an instruction set: sixteen lanes of floats and whole numbers, four bytes to a lane.
//!
//! Kernels over packed weights are written once in these words ([`super::tile`]); each instruction set says them in
//! its own registers.

/// Sixteen lanes.
///
/// # Safety
/// Every function needs the processor's instructions that the implementing table was chosen for, and pointers that
/// may be read (or written) for as many bytes as it says. None needs alignment beyond its element.
pub(crate) unsafe trait Lanes {
    /// 64 bytes, four to a lane.
    type Bytes: Copy;
    /// Sixteen whole numbers.
    type Ints: Copy;
    /// Sixteen floats.
    type Floats: Copy;
    /// Does [`Lanes::dot_wide`] take 128 from each weight?
    const SIGNED: bool;
    /// Is [`Lanes::bf16_dot`] an instruction? Elsewhere kernels widen inputs once for many products.
    const BRAIN: bool = false;
    /// Is [`Lanes::dot`] one instruction, of which nothing can be made ahead?
    const FUSED: bool = false;
    /// Are several products with [`Lanes::gather`] and one [`Lanes::settle`] faster than as many with [`Lanes::dot`]?
    const GATHERS: bool = false;

    /// Reads 64 bytes.
    unsafe fn bytes(p: *const u8) -> Self::Bytes;
    /// Says that a cache line is read soon.
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    /// Says that a cache line is read after some thousand instructions: it need not be in the first-level cache.
    #[inline(always)]
    unsafe fn prefetch_later(_: *const u8) {}
    /// Transposes words of four bytes: reads 64 bytes of each of sixteen rows, `stride` bytes apart, and writes
    /// sixteen times the sixteen words of a column.
    #[inline(always)]
    unsafe fn transpose(rows: *const u8, stride: usize, out: *mut u8) {
        for row in 0..16 {
            for word in 0..16 {
                // SAFETY: the caller's rows and output.
                unsafe {
                    let value = rows.add(row * stride + 4 * word).cast::<u32>().read_unaligned();
                    out.add(64 * word + 4 * row).cast::<u32>().write_unaligned(value);
                }
            }
        }
    }
    /// Puts the first bytes at `p` where the mask has bits, in rising order, and `zero` elsewhere; 64 bytes may be read.
    #[inline(always)]
    unsafe fn spread_bytes(p: *const u8, mask: u64, zero: u8) -> Self::Bytes {
        let (mut out, mut from, mut left) = ([zero; 64], 0, mask);
        while left != 0 {
            // SAFETY: the caller's bytes.
            out[left.trailing_zeros() as usize] = unsafe { *p.add(from) };
            from += 1;
            left &= left - 1;
        }
        // SAFETY: 64 bytes.
        unsafe { Self::bytes(out.as_ptr()) }
    }
    /// The same of halves of bytes, the lower one of each first; 32 bytes may be read.
    #[inline(always)]
    unsafe fn spread_nibbles(p: *const u8, mask: u64, zero: u8) -> Self::Bytes {
        let (mut out, mut from, mut left) = ([zero; 64], 0, mask);
        while left != 0 {
            // SAFETY: the caller's bytes.
            out[left.trailing_zeros() as usize] = unsafe { *p.add(from / 2) } >> (4 * (from % 2)) & 15;
            from += 1;
            left &= left - 1;
        }
        // SAFETY: 64 bytes.
        unsafe { Self::bytes(out.as_ptr()) }
    }
    /// Puts the first words of 16 bits at `p` where the mask has bits, in rising order, and zero elsewhere: 16-bit floats, or
    /// brain floats. 32 bytes may be read.
    #[inline(always)]
    unsafe fn spread_halves<const BRAIN: bool>(p: *const u8, mask: u16) -> Self::Floats {
        let (mut out, mut from, mut left) = ([0u16; 16], 0, mask);
        while left != 0 {
            // SAFETY: the caller's words.
            out[left.trailing_zeros() as usize] = unsafe { p.cast::<u16>().add(from).read_unaligned() };
            from += 1;
            left &= left - 1;
        }
        // SAFETY: sixteen numbers each.
        unsafe {
            if BRAIN {
                Self::load(out.map(|bits| f32::from_bits(u32::from(bits) << 16)).as_ptr())
            } else {
                Self::halves(out.as_ptr().cast())
            }
        }
    }
    /// The same of 32-bit floats; 64 bytes may be read.
    #[inline(always)]
    unsafe fn spread_floats(p: *const u8, mask: u16) -> Self::Floats {
        let (mut out, mut from, mut left) = ([0f32; 16], 0, mask);
        while left != 0 {
            // SAFETY: the caller's floats.
            out[left.trailing_zeros() as usize] = unsafe { p.cast::<f32>().add(from).read_unaligned() };
            from += 1;
            left &= left - 1;
        }
        // SAFETY: sixteen floats.
        unsafe { Self::load(out.as_ptr()) }
    }
    /// The bits of every byte that `mask` keeps.
    unsafe fn and(b: Self::Bytes, mask: u8) -> Self::Bytes;
    /// The bits of both.
    unsafe fn or(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Every byte moved down by `N` bits; what comes from the neighbour is the caller's to mask.
    unsafe fn down<const N: u32>(b: Self::Bytes) -> Self::Bytes;
    /// Every byte moved up by `N` bits; what comes from the neighbour is the caller's to mask.
    unsafe fn up<const N: u32>(b: Self::Bytes) -> Self::Bytes;
    /// Looks every byte (0 to 15) up in a table.
    unsafe fn lookup(table: &[u8; 16], b: Self::Bytes) -> Self::Bytes;
    /// Adds to each lane the product of its four unsigned bytes of at most 127 with the four signed bytes of `x`.
    unsafe fn dot(acc: Self::Ints, w: Self::Bytes, x: Self::Ints) -> Self::Ints;
    /// [`Lanes::dot`] into sums that only [`Lanes::settle`] reads, of zeros or of at most [`gathered`] products before.
    #[inline(always)]
    unsafe fn gather(sums: Self::Ints, w: Self::Bytes, x: Self::Ints) -> Self::Ints {
        // SAFETY: the caller's.
        unsafe { Self::dot(sums, w, x) }
    }
    /// Adds what was gathered.
    #[inline(always)]
    unsafe fn settle(acc: Self::Ints, sums: Self::Ints) -> Self::Ints {
        // SAFETY: sums of products of bytes are whole as floats.
        unsafe { Self::to_ints(Self::add(Self::to_floats(acc), Self::to_floats(sums))) }
    }
    /// The same for bytes up to 255, or for those bytes less 128 where [`Lanes::SIGNED`].
    unsafe fn dot_wide(acc: Self::Ints, w: Self::Bytes, x: Self::Ints) -> Self::Ints;
    /// Of each byte of `from` (0 to 7) the byte of that number: 0 to 3 are at `first`, 4 to 7 at `second`.
    unsafe fn select(first: *const u8, second: *const u8, from: Self::Bytes) -> Self::Ints;
    /// The four-byte number at `p` in every lane.
    unsafe fn splat_int(p: *const u8) -> Self::Ints;
    /// Reads sixteen whole numbers.
    unsafe fn ints(p: *const i32) -> Self::Ints;
    /// Moves every number up by `N` bits.
    unsafe fn ints_up<const N: u32>(a: Self::Ints) -> Self::Ints;
    /// To floats.
    unsafe fn to_floats(a: Self::Ints) -> Self::Floats;
    /// To whole numbers; the floats are whole.
    unsafe fn to_ints(a: Self::Floats) -> Self::Ints;
    /// Zeros.
    unsafe fn zero() -> Self::Floats;
    /// The float at `p` in every lane.
    unsafe fn splat(p: *const u8) -> Self::Floats;
    /// Reads sixteen floats.
    unsafe fn load(p: *const f32) -> Self::Floats;
    /// Writes sixteen floats.
    unsafe fn store(p: *mut f32, a: Self::Floats);
    /// Reads sixteen 16-bit floats.
    unsafe fn halves(p: *const u8) -> Self::Floats;
    /// Reads two 16-bit floats of each lane: their four bytes are the upper ones of the lane's words in four times
    /// 64 bytes.
    unsafe fn uppermost(p: *const u8) -> [Self::Floats; 2];
    /// Reads sixteen signed bytes.
    unsafe fn signed(p: *const u8) -> Self::Floats;
    /// Reads the low and the high halves of sixteen bytes.
    unsafe fn nibbles(p: *const u8) -> (Self::Floats, Self::Floats);
    /// Reads four numbers of six bits from the word of each lane, lowest first; returns the first two times `d` and
    /// the others times `-m`, each rounded once; a zero has either sign.
    unsafe fn sixes(p: *const u8, d: Self::Floats, m: Self::Floats) -> [Self::Floats; 4];
    /// `a + b`.
    unsafe fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// The greater of each lane; where `a` is not a number, `b`.
    unsafe fn max(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `2^n` of whole `n` from -126 to 127.
    unsafe fn power(n: Self::Floats) -> Self::Floats;
    /// `a * b`.
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `-(a * b)`.
    unsafe fn negative_mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c`, rounded once where the instruction set can.
    unsafe fn fma(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// The first and the second brain float of each lane.
    unsafe fn brain_pair(w: Self::Bytes) -> [Self::Floats; 2];
    /// Adds to each lane the product of its two brain floats with the two at `x`: the second pair first.
    #[inline(always)]
    unsafe fn bf16_dot(acc: Self::Floats, w: Self::Bytes, x: *const u8) -> Self::Floats {
        // SAFETY: the caller's pair.
        unsafe { dot_of_pair::<Self>(acc, w, x) }
    }
}

/// [`Lanes::bf16_dot`] in two products of floats.
///
/// # Safety
/// As of [`Lanes`].
#[inline(always)]
pub(super) unsafe fn dot_of_pair<V: Lanes + ?Sized>(acc: V::Floats, w: V::Bytes, x: *const u8) -> V::Floats {
    // SAFETY: the caller's pair.
    unsafe {
        let pair = x.cast::<u32>().read_unaligned();
        let (low, high) = (pair << 16, pair & 0xffff_0000);
        let [first, second] = V::brain_pair(w);
        let sum = V::fma(second, V::splat((&raw const high).cast()), acc);
        V::fma(first, V::splat((&raw const low).cast()), sum)
    }
}

/// Products of codes of so many bits with signed bytes whose sums in pairs fit 16 bits.
pub(super) const fn gathered(bits: u8) -> usize {
    i16::MAX as usize / (2 * 127 * ((1 << bits) - 1))
}
