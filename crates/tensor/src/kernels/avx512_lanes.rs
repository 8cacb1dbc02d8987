//! The words of [`Lanes`] in AVX-512 with VNNI and VBMI2; `BF16` says whether the products of brain floats are there too.

use super::lanes::{Lanes, dot_of_pair};
use std::arch::x86_64::*;

/// Sixteen lanes in one register.
pub struct Avx512<const BF16: bool>;

/// One half of what [`Lanes::uppermost`] reads.
///
/// # Safety
/// The processor has the instructions, and the pointer holds what [`Lanes`] says.
#[inline(always)]
unsafe fn upper_halves(p: *const u8) -> __m512 {
    // SAFETY: as the function says.
    unsafe {
        let (low, high) = (_mm512_loadu_si512(p.cast()), _mm512_loadu_si512(p.add(64).cast()));
        let high = _mm512_and_si512(_mm512_srli_epi32::<16>(high), _mm512_set1_epi32(0xff00));
        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_or_si512(_mm512_srli_epi32::<24>(low), high)))
    }
}

/// Six bits of every lane from bit `AT` on (0, 6 or 12) as `2^(23 - AT)` more than their number: a float whose
/// mantissa they are part of.
///
/// # Safety
/// The processor has the instructions.
#[inline(always)]
unsafe fn raised<const AT: u32>(v: __m512i) -> __m512 {
    // SAFETY: as the function says.
    unsafe {
        let exponent = _mm512_set1_epi32((127 + 23 - AT as i32) << 23);
        // a & b | c
        _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xf8>(exponent, v, _mm512_set1_epi32(63 << AT)))
    }
}

// SAFETY: every function is one or a few instructions of AVX-512 F, BW, VL, DQ, VNNI, VBMI2 (and BF16 where asked for) on
// its arguments, and reads or writes what the trait says.
unsafe impl<const BF16: bool> Lanes for Avx512<BF16> {
    type Bytes = __m512i;
    type Ints = __m512i;
    type Floats = __m512;
    const SIGNED: bool = false;
    const BRAIN: bool = BF16;
    const FUSED: bool = true;

    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_later(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn transpose(rows: *const u8, stride: usize, out: *mut u8) {
        unsafe {
            let mut t = [_mm512_setzero_pd(); 16];
            for r in 0..16 {
                t[r] = _mm512_loadu_pd(rows.add(r * stride).cast());
            }
            let mut a = t;
            for i in 0..8 {
                let (even, odd) = (_mm512_castpd_ps(t[2 * i]), _mm512_castpd_ps(t[2 * i + 1]));
                a[2 * i] = _mm512_castps_pd(_mm512_unpacklo_ps(even, odd));
                a[2 * i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(even, odd));
            }
            let mut b = a;
            for i in 0..4 {
                b[4 * i] = _mm512_unpacklo_pd(a[4 * i], a[4 * i + 2]);
                b[4 * i + 1] = _mm512_unpackhi_pd(a[4 * i], a[4 * i + 2]);
                b[4 * i + 2] = _mm512_unpacklo_pd(a[4 * i + 1], a[4 * i + 3]);
                b[4 * i + 3] = _mm512_unpackhi_pd(a[4 * i + 1], a[4 * i + 3]);
            }
            let mut c = b;
            for i in 0..4 {
                // Register `i + 4 g` holds column `i + 4 lane` of rows `4 g .. 4 g + 4` in each lane.
                c[i] = _mm512_shuffle_f64x2::<0x88>(b[i], b[i + 4]);
                c[i + 4] = _mm512_shuffle_f64x2::<0xdd>(b[i], b[i + 4]);
                c[i + 8] = _mm512_shuffle_f64x2::<0x88>(b[i + 8], b[i + 12]);
                c[i + 12] = _mm512_shuffle_f64x2::<0xdd>(b[i + 8], b[i + 12]);
            }
            for i in 0..4 {
                let out = out.cast::<f64>();
                _mm512_storeu_pd(out.add(8 * i), _mm512_shuffle_f64x2::<0x88>(c[i], c[i + 8]));
                _mm512_storeu_pd(out.add(8 * (i + 8)), _mm512_shuffle_f64x2::<0xdd>(c[i], c[i + 8]));
                _mm512_storeu_pd(out.add(8 * (i + 4)), _mm512_shuffle_f64x2::<0x88>(c[i + 4], c[i + 12]));
                _mm512_storeu_pd(out.add(8 * (i + 12)), _mm512_shuffle_f64x2::<0xdd>(c[i + 4], c[i + 12]));
            }
        }
    }
    #[inline(always)]
    unsafe fn spread_bytes(p: *const u8, mask: u64, zero: u8) -> __m512i {
        unsafe { _mm512_mask_expand_epi8(_mm512_set1_epi8(zero as i8), mask, _mm512_loadu_si512(p.cast())) }
    }
    #[inline(always)]
    unsafe fn spread_nibbles(p: *const u8, mask: u64, zero: u8) -> __m512i {
        unsafe {
            // A byte to each word of 16 bits, whose upper half goes to the byte above.
            let words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(p.cast()));
            let bytes = _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16::<4>(words)), _mm512_set1_epi8(15));
            _mm512_mask_expand_epi8(_mm512_set1_epi8(zero as i8), mask, bytes)
        }
    }
    #[inline(always)]
    unsafe fn spread_halves<const BRAIN: bool>(p: *const u8, mask: u16) -> __m512 {
        unsafe {
            let words = _mm256_maskz_expand_epi16(mask, _mm256_loadu_si256(p.cast()));
            if BRAIN {
                return _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)));
            }
            _mm512_cvtph_ps(words)
        }
    }
    #[inline(always)]
    unsafe fn spread_floats(p: *const u8, mask: u16) -> __m512 {
        unsafe { _mm512_maskz_expand_ps(mask, _mm512_loadu_ps(p.cast())) }
    }
    #[inline(always)]
    unsafe fn and(b: __m512i, mask: u8) -> __m512i {
        unsafe { _mm512_and_si512(b, _mm512_set1_epi8(mask as i8)) }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn down<const N: u32>(b: __m512i) -> __m512i {
        unsafe { _mm512_srli_epi32::<N>(b) }
    }
    #[inline(always)]
    unsafe fn up<const N: u32>(b: __m512i) -> __m512i {
        unsafe { _mm512_slli_epi32::<N>(b) }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], b: __m512i) -> __m512i {
        unsafe { _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), b) }
    }
    #[inline(always)]
    unsafe fn dot(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(acc, w, x) }
    }
    #[inline(always)]
    unsafe fn dot_wide(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        unsafe { Self::dot(acc, w, x) }
    }
    #[inline(always)]
    unsafe fn select(first: *const u8, second: *const u8, from: __m512i) -> __m512i {
        unsafe {
            let [first, second] = [first, second].map(|p| p.cast::<i32>().read_unaligned());
            let both = _mm512_mask_set1_epi32(_mm512_set1_epi32(first), 0xaaaa, second);
            _mm512_shuffle_epi8(both, from)
        }
    }
    #[inline(always)]
    unsafe fn splat_int(p: *const u8) -> __m512i {
        unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn ints(p: *const i32) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn ints_up<const N: u32>(a: __m512i) -> __m512i {
        unsafe { _mm512_slli_epi32::<N>(a) }
    }
    #[inline(always)]
    unsafe fn to_floats(a: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn to_ints(a: __m512) -> __m512i {
        unsafe { _mm512_cvtps_epi32(a) }
    }
    #[inline(always)]
    unsafe fn zero() -> __m512 {
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> __m512 {
        unsafe { _mm512_set1_ps(p.cast::<f32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, a: __m512) {
        unsafe { _mm512_storeu_ps(p, a) }
    }
    #[inline(always)]
    unsafe fn halves(p: *const u8) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn uppermost(p: *const u8) -> [__m512; 2] {
        unsafe { [upper_halves(p), upper_halves(p.add(128))] }
    }
    #[inline(always)]
    unsafe fn signed(p: *const u8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn nibbles(p: *const u8) -> (__m512, __m512) {
        unsafe {
            let v = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let low = _mm512_and_si512(v, _mm512_set1_epi32(15));
            (_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(v)))
        }
    }
    #[inline(always)]
    unsafe fn sixes(p: *const u8, d: __m512, m: __m512) -> [__m512; 4] {
        unsafe {
            let v = _mm512_loadu_si512(p.cast());
            // `d (2^n + s) - d 2^n`, fused: the product `d s`, rounded once, without a conversion of `s`.
            [
                _mm512_fmsub_ps(d, raised::<0>(v), _mm512_mul_ps(d, _mm512_set1_ps((1 << 23) as f32))),
                _mm512_fmsub_ps(d, raised::<6>(v), _mm512_mul_ps(d, _mm512_set1_ps((1 << 17) as f32))),
                _mm512_fnmadd_ps(m, raised::<12>(v), _mm512_mul_ps(m, _mm512_set1_ps((1 << 11) as f32))),
                _mm512_fnmadd_ps(
                    m,
                    raised::<12>(_mm512_srli_epi32::<6>(v)),
                    _mm512_mul_ps(m, _mm512_set1_ps((1 << 11) as f32)),
                ),
            ]
        }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn power(n: __m512) -> __m512 {
        unsafe {
            let n = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
        }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn negative_mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_fnmadd_ps(a, b, _mm512_setzero_ps()) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn brain_pair(w: __m512i) -> [__m512; 2] {
        unsafe {
            let second = _mm512_and_si512(w, _mm512_set1_epi32(-65536));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(w)), _mm512_castsi512_ps(second)]
        }
    }

    #[inline(always)]
    unsafe fn bf16_dot(acc: __m512, w: __m512i, x: *const u8) -> __m512 {
        unsafe {
            if BF16 {
                return _mm512_dpbf16_ps(
                    acc,
                    std::mem::transmute::<__m512i, __m512bh>(w),
                    std::mem::transmute::<__m512i, __m512bh>(Self::splat_int(x)),
                );
            }
            dot_of_pair::<Self>(acc, w, x)
        }
    }
}
