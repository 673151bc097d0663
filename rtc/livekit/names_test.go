package livekit

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The examples of MSC4195, of its earlier texts, and of a room ID that encoding/json would escape.
func TestNames(t *testing.T) {
	require.Equal(t, "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc", RoomName("!roomid:example.com", "slot1234"))
	require.Equal(t, "krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs", RoomName("!room:example.com", "m.call#ROOM"))
	require.Equal(t, "bbsvLlC/1puRULGEH98eUY7EYJD3oQ7x3nEWT65ioH4", RoomName("!a<b>&:example.com", "m.call#ROOM"))
	require.Equal(t, "IMeDd+K3MIqJTI20EXBIrepKkhhORvf3q8fx3rlrhTk", hash("!roomid:example.com", "slot123", "random123"))
	require.Equal(t, "M3VnsLXrkbxIDINXO64u8PZzFyD9ZYFiQULR2dshWYs", Identity("@alice:example.com", "memberABC"))
	require.Equal(t, "J+T45tGruxc+HrUOqJJlyQSV33m728Cme4+vt8/SWrU", Identity("@alice:example.com", "DEVICE123", "memberABC"))
}

// What is hashed is canonical JSON, whatever the characters are.
func FuzzNames(f *testing.F) {
	f.Add("!a<b>&:example.com", "m.call#ROOM")
	f.Add("quote \" backslash \\ slash /", "escape \\u003c, \\n")
	f.Add("\x00\b\t\n\v\f\r\x1f\x7f", "ü 漢字 😀")
	f.Add("\u2028\u2029\ufffd\ufeff", "not UTF-8: \xff\xc3\x28\xed\xa0\x80")
	f.Add("", "[]{}:, -0")
	f.Fuzz(func(t *testing.T, a, b string) {
		sum := sha256.Sum256([]byte("[" + canonical(a) + "," + canonical(b) + "]"))
		require.Equal(t, base64.RawStdEncoding.EncodeToString(sum[:]), RoomName(a, b))
	})
}

// canonical returns a string as the Matrix specification wants it in canonical JSON: only what must be escaped is.
func canonical(s string) string {
	var out strings.Builder
	out.WriteByte('"')
	for _, r := range s {
		switch short := strings.IndexRune("\b\t\n\f\r\"\\", r); {
		case short >= 0:
			out.WriteByte('\\')
			out.WriteByte(`btnfr"\`[short])
		case r < ' ':
			fmt.Fprintf(&out, `\u%04x`, r)
		default:
			out.WriteRune(r)
		}
	}
	out.WriteByte('"')
	return out.String()
}
