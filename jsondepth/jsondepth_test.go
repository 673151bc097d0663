package jsondepth

import (
	"bytes"
	"encoding/json"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func nested(levels int) string {
	return strings.Repeat(`{"a":[`, levels/2) + strings.Repeat(`[`, levels%2) + strings.Repeat(`]`, levels%2) +
		strings.Repeat(`]}`, levels/2)
}

func TestTooDeep(t *testing.T) {
	for _, test := range []struct {
		name, text string
		deep       bool
	}{
		{"nothing", ``, false},
		{"no nesting", `1`, false},
		{"at the limit", nested(Max), false},
		{"one more", nested(Max + 1), true},
		{"wide, not deep", `[` + strings.Repeat(`{"a":[1]},`, 1000) + `1]`, false},
		{"brackets in a string", `"` + strings.Repeat(`[{`, 1000) + `"`, false},
		{"brackets behind an escaped quotation mark", `"\"` + strings.Repeat(`[`, 1000) + `"`, false},
		{"brackets behind a string that ends with a backslash", `["\\",` + nested(Max) + `]`, true},
		{"brackets in a key", `{"` + strings.Repeat(`[`, 1000) + `":1}`, false},
		{"escaped backslashes and a quotation mark", `"\\\\\\\"` + strings.Repeat(`[`, 1000) + `"`, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			require.Equal(t, test.deep, TooDeep([]byte(test.text)))
			// The result is the same for pieces of any size.
			for size := 1; size < 8; size++ {
				require.Equal(t, test.deep, inPieces([]byte(test.text), size), "pieces of %d bytes", size)
			}
		})
	}
}

func inPieces(text []byte, size int) bool {
	var c Counter
	for len(text) > 0 {
		n := min(size, len(text))
		if c.TooDeep(text[:n]) {
			return true
		}
		text = text[n:]
	}
	return false
}

// FuzzDepth compares the result with the nesting that encoding/json finds.
func FuzzDepth(f *testing.F) {
	for _, seed := range []string{
		`{"a":[1,"]"]}`, `"\\"`, `["\"[["]`, nested(Max), nested(Max + 1), `{"\\":{"\u005b":"\u0022[["}}`, `[[],[[]],{}]`,
	} {
		f.Add([]byte(seed), 3, Max-2)
	}
	f.Fuzz(func(t *testing.T, text []byte, size, around int) {
		if !json.Valid(text) {
			return
		}
		// Levels are added around the text, so that short inputs come near the limit.
		around = min(max(around, 0), Max+2)
		text = []byte(strings.Repeat(`[`, around) + string(text) + strings.Repeat(`]`, around))
		want := depth(t, text) > Max
		require.Equal(t, want, TooDeep(text))
		require.Equal(t, want, inPieces(text, min(max(size, 1), len(text))))
	})
}

func depth(t *testing.T, text []byte) (deepest int) {
	decoder := json.NewDecoder(bytes.NewReader(text))
	for depth := 0; ; {
		token, err := decoder.Token()
		if err == io.EOF {
			return deepest
		}
		require.NoError(t, err)
		switch token {
		case json.Delim('{'), json.Delim('['):
			depth++
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
		deepest = max(deepest, depth)
	}
}

func BenchmarkTooDeep(b *testing.B) {
	for name, text := range map[string]string{
		"strings":   `["` + strings.Repeat(`word `, 10_000) + `"]`,
		"structure": `[` + strings.Repeat(`{"a":[1,2]},`, 5_000) + `1]`,
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				TooDeep([]byte(text))
			}
		})
	}
}
