//! The words of [`Lanes`] in AVX2 with FMA and F16C: each is said twice, for the lower and the upper eight lanes.

use super::lanes::Lanes;
use std::arch::x86_64::*;

/// Sixteen lanes in two registers.
pub struct Avx2;

/// The bytes of one register, `which` of two.
///
/// # Safety
/// The processor has the instructions, and the pointers hold what [`Lanes`] says.
#[inline(always)]
unsafe fn half(p: *const u8, which: usize) -> __m256i {
    // SAFETY: as the function says.
    unsafe { _mm256_loadu_si256(p.add(32 * which).cast()) }
}

/// One half of what [`Lanes::uppermost`] reads.
///
/// # Safety
/// The processor has the instructions, and the pointer holds what [`Lanes`] says.
#[inline(always)]
unsafe fn upper_halves(p: *const u8) -> [__m256; 2] {
    // SAFETY: as the function says.
    unsafe {
        let mut words = [_mm256_setzero_si256(); 2];
        for i in 0..2 {
            let high = _mm256_and_si256(_mm256_srli_epi32::<16>(half(p.add(64), i)), _mm256_set1_epi32(0xff00));
            words[i] = _mm256_or_si256(_mm256_srli_epi32::<24>(half(p, i)), high);
        }
        // Packing works inside halves of a register; the quarters are put in order afterwards.
        let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(words[0], words[1]));
        [_mm256_cvtph_ps(_mm256_castsi256_si128(packed)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(packed))]
    }
}

/// Six bits of every lane from bit `AT` on.
///
/// # Safety
/// The processor has the instructions.
#[inline(always)]
unsafe fn six<const AT: i32>(v: [__m256i; 2]) -> [__m256; 2] {
    // SAFETY: as the function says.
    unsafe {
        let mask = _mm256_set1_epi32(63);
        [
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<AT>(v[0]), mask)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<AT>(v[1]), mask)),
        ]
    }
}

/// Eight words of 64 bits as 64 bytes.
///
/// # Safety
/// The processor has the instructions.
#[inline(always)]
unsafe fn of_words(w: [u64; 8]) -> [__m256i; 2] {
    let w = w.map(u64::cast_signed);
    // SAFETY: as the function says.
    unsafe { [_mm256_set_epi64x(w[3], w[2], w[1], w[0]), _mm256_set_epi64x(w[7], w[6], w[5], w[4])] }
}

/// 255 in the bytes whose bit is set.
///
/// # Safety
/// The processor has the instructions.
#[inline(always)]
unsafe fn bytes_of(mask: u64) -> u64 {
    // SAFETY: as the function says.
    unsafe { _pdep_u64(mask & 255, 0x0101_0101_0101_0101) * 255 }
}

/// # Safety
/// The processor has the instructions, and the pointers hold what [`Lanes`] says.
#[inline(always)]
unsafe fn both<A: Copy, B>(a: [A; 2], f: impl Fn(A) -> B) -> [B; 2] {
    [f(a[0]), f(a[1])]
}

// SAFETY: every function is a few instructions of AVX2, FMA and F16C on its arguments, and reads or writes what the
// trait says.
unsafe impl Lanes for Avx2 {
    type Bytes = [__m256i; 2];
    type Ints = [__m256i; 2];
    type Floats = [__m256; 2];
    // Sums of two products of bytes are kept in 16 bits, which unsigned bytes beyond 127 would overflow.
    const SIGNED: bool = true;
    const GATHERS: bool = true;

    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> [__m256i; 2] {
        unsafe { [half(p, 0), half(p, 1)] }
    }
    #[inline(always)]
    unsafe fn spread_bytes(p: *const u8, mask: u64, zero: u8) -> [__m256i; 2] {
        unsafe {
            let (mut words, mut from) = ([0; 8], 0);
            for (i, word) in words.iter_mut().enumerate() {
                let mask = mask >> (8 * i) & 255;
                let there = bytes_of(mask);
                let data = p.add(from).cast::<u64>().read_unaligned();
                *word = _pdep_u64(data, there) | !there & (u64::from(zero) * 0x0101_0101_0101_0101);
                from += mask.count_ones() as usize;
            }
            of_words(words)
        }
    }
    #[inline(always)]
    unsafe fn spread_nibbles(p: *const u8, mask: u64, zero: u8) -> [__m256i; 2] {
        unsafe {
            let (mut words, mut from) = ([0; 8], 0);
            for (i, word) in words.iter_mut().enumerate() {
                let mask = mask >> (8 * i) & 255;
                let there = bytes_of(mask);
                let data = p.add(from / 2).cast::<u64>().read_unaligned() >> (4 * (from % 2));
                let codes = _pdep_u64(data, there & 0x0f0f_0f0f_0f0f_0f0f);
                *word = codes | !there & (u64::from(zero) * 0x0101_0101_0101_0101);
                from += mask.count_ones() as usize;
            }
            of_words(words)
        }
    }
    #[inline(always)]
    unsafe fn spread_halves<const BRAIN: bool>(p: *const u8, mask: u16) -> [__m256; 2] {
        unsafe {
            let (mut words, mut from) = ([0i64; 4], 0);
            for (i, word) in words.iter_mut().enumerate() {
                let mask = u64::from(mask) >> (4 * i) & 15;
                let there = _pdep_u64(mask, 0x0001_0001_0001_0001) * 0xffff;
                let data = p.add(2 * from).cast::<u64>().read_unaligned();
                *word = _pdep_u64(data, there).cast_signed();
                from += mask.count_ones() as usize;
            }
            let halves = [_mm_set_epi64x(words[1], words[0]), _mm_set_epi64x(words[3], words[2])];
            if BRAIN {
                return both(halves, |v| {
                    _mm256_castsi256_ps(_mm256_sll_epi32(_mm256_cvtepu16_epi32(v), _mm_cvtsi32_si128(16)))
                });
            }
            both(halves, |v| _mm256_cvtph_ps(v))
        }
    }
    #[inline(always)]
    unsafe fn and(b: [__m256i; 2], mask: u8) -> [__m256i; 2] {
        unsafe { both(b, |v| _mm256_and_si256(v, _mm256_set1_epi8(mask as i8))) }
    }
    #[inline(always)]
    unsafe fn or(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn down<const N: u32>(b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { both(b, |v| _mm256_srl_epi32(v, _mm_cvtsi32_si128(N as i32))) }
    }
    #[inline(always)]
    unsafe fn up<const N: u32>(b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { both(b, |v| _mm256_sll_epi32(v, _mm_cvtsi32_si128(N as i32))) }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            both(b, |v| _mm256_shuffle_epi8(table, v))
        }
    }
    #[inline(always)]
    unsafe fn dot(acc: [__m256i; 2], w: [__m256i; 2], x: [__m256i; 2]) -> [__m256i; 2] {
        unsafe {
            let sum = |w, x| _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
            [_mm256_add_epi32(acc[0], sum(w[0], x[0])), _mm256_add_epi32(acc[1], sum(w[1], x[1]))]
        }
    }
    #[inline(always)]
    unsafe fn gather(sums: [__m256i; 2], w: [__m256i; 2], x: [__m256i; 2]) -> [__m256i; 2] {
        unsafe {
            [
                _mm256_add_epi16(sums[0], _mm256_maddubs_epi16(w[0], x[0])),
                _mm256_add_epi16(sums[1], _mm256_maddubs_epi16(w[1], x[1])),
            ]
        }
    }
    #[inline(always)]
    unsafe fn settle(acc: [__m256i; 2], sums: [__m256i; 2]) -> [__m256i; 2] {
        unsafe {
            let ones = _mm256_set1_epi16(1);
            [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(sums[0], ones)),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(sums[1], ones)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn dot_wide(acc: [__m256i; 2], w: [__m256i; 2], x: [__m256i; 2]) -> [__m256i; 2] {
        unsafe {
            let sum = |w, x| {
                let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
            };
            [_mm256_add_epi32(acc[0], sum(w[0], x[0])), _mm256_add_epi32(acc[1], sum(w[1], x[1]))]
        }
    }
    #[inline(always)]
    unsafe fn select(first: *const u8, second: *const u8, from: [__m256i; 2]) -> [__m256i; 2] {
        unsafe {
            let [first, second] = [first, second].map(|p| u64::from(p.cast::<u32>().read_unaligned()));
            let both = _mm256_set1_epi64x((first | second << 32).cast_signed());
            [_mm256_shuffle_epi8(both, from[0]), _mm256_shuffle_epi8(both, from[1])]
        }
    }
    #[inline(always)]
    unsafe fn splat_int(p: *const u8) -> [__m256i; 2] {
        unsafe { [_mm256_set1_epi32(p.cast::<i32>().read_unaligned()); 2] }
    }
    #[inline(always)]
    unsafe fn ints(p: *const i32) -> [__m256i; 2] {
        unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast())] }
    }
    #[inline(always)]
    unsafe fn ints_up<const N: u32>(a: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { Self::up::<N>(a) }
    }
    #[inline(always)]
    unsafe fn to_floats(a: [__m256i; 2]) -> [__m256; 2] {
        unsafe { both(a, |v| _mm256_cvtepi32_ps(v)) }
    }
    #[inline(always)]
    unsafe fn to_ints(a: [__m256; 2]) -> [__m256i; 2] {
        unsafe { both(a, |v| _mm256_cvtps_epi32(v)) }
    }
    #[inline(always)]
    unsafe fn zero() -> [__m256; 2] {
        unsafe { [_mm256_setzero_ps(); 2] }
    }
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> [__m256; 2] {
        unsafe { [_mm256_set1_ps(p.cast::<f32>().read_unaligned()); 2] }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [__m256; 2] {
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, a: [__m256; 2]) {
        unsafe {
            _mm256_storeu_ps(p, a[0]);
            _mm256_storeu_ps(p.add(8), a[1]);
        }
    }
    #[inline(always)]
    unsafe fn halves(p: *const u8) -> [__m256; 2] {
        unsafe { [0, 1].map(|i| _mm256_cvtph_ps(_mm_loadu_si128(p.add(16 * i).cast()))) }
    }
    #[inline(always)]
    unsafe fn uppermost(p: *const u8) -> [[__m256; 2]; 2] {
        unsafe { [upper_halves(p), upper_halves(p.add(128))] }
    }
    #[inline(always)]
    unsafe fn signed(p: *const u8) -> [__m256; 2] {
        unsafe { [0, 1].map(|i| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8 * i).cast())))) }
    }
    #[inline(always)]
    unsafe fn nibbles(p: *const u8) -> ([__m256; 2], [__m256; 2]) {
        unsafe {
            let v = [0, 1].map(|i| _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8 * i).cast())));
            let low = both(v, |v| _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(15))));
            (low, both(v, |v| _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(v))))
        }
    }
    #[inline(always)]
    unsafe fn sixes(p: *const u8, d: [__m256; 2], m: [__m256; 2]) -> [[__m256; 2]; 4] {
        unsafe {
            let v = Self::bytes(p);
            [
                Self::mul(d, six::<0>(v)),
                Self::mul(d, six::<6>(v)),
                Self::negative_mul(m, six::<12>(v)),
                Self::negative_mul(m, six::<18>(v)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn add(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn max(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn power(n: [__m256; 2]) -> [__m256; 2] {
        unsafe {
            let bits = |n| _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)));
            [_mm256_castsi256_ps(bits(n[0])), _mm256_castsi256_ps(bits(n[1]))]
        }
    }
    #[inline(always)]
    unsafe fn mul(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn negative_mul(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe {
            let zero = _mm256_setzero_ps();
            [_mm256_fnmadd_ps(a[0], b[0], zero), _mm256_fnmadd_ps(a[1], b[1], zero)]
        }
    }
    #[inline(always)]
    unsafe fn fma(a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn brain_pair(w: [__m256i; 2]) -> [[__m256; 2]; 2] {
        unsafe {
            let upper = _mm256_set1_epi32(-65536);
            let first = [_mm256_slli_epi32::<16>(w[0]), _mm256_slli_epi32::<16>(w[1])];
            let second = [_mm256_and_si256(w[0], upper), _mm256_and_si256(w[1], upper)];
            [
                [_mm256_castsi256_ps(first[0]), _mm256_castsi256_ps(first[1])],
                [_mm256_castsi256_ps(second[0]), _mm256_castsi256_ps(second[1])],
            ]
        }
    }
}
