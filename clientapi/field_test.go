package clientapi

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

func TestParseContent(t *testing.T) {
	for _, test := range []struct {
		content, want string
		duration      time.Duration
		bad           bool
	}{
		{content: ``, want: ``},
		{content: `{"body":"m.will_expire"}`, want: `{"body":"m.will_expire"}`},
		{content: `{ "m.will_expire" : "ended" }`, want: `{ "m.will_expire" : "ended" }`},
		{content: `{"m.will_expire":1}`, want: `{"m.will_expire":"running"}`, duration: time.Second},
		{content: `{"m.will_expire":3600,"a":[1, 2]}`, want: `{"a":[1,2],"m.will_expire":"running"}`, duration: time.Hour},
		{content: `{"m\u002ewill_expire":5}`, want: `{"m.will_expire":"running"}`, duration: 5 * time.Second},
		// Of repeated keys the last one counts, as in Dendrite.
		{content: `{"m.will_expire":"x","m.will_expire":5}`, want: `{"m.will_expire":"running"}`, duration: 5 * time.Second},
		{content: `{"m.will_expire":5,"m.will_expire":"x"}`, bad: true},
		{content: `{"m.will_expire":3601}`, bad: true},
		{content: `{"m.will_expire":-5}`, bad: true},
		{content: `{"m.will_expire":-0}`, bad: true},
		{content: `{"m.will_expire":null}`, bad: true},
		{content: `{"m.will_expire":5`, want: `{"m.will_expire":5`},
		{content: "{\"m.will_expire\":5,\"\xff\":1}", want: "{\"m.will_expire\":5,\"\xff\":1}"},
		{content: `null "m.will_expire"`, want: `null "m.will_expire"`},
	} {
		got, duration, err := parseContent([]byte(test.content), time.Hour)
		if test.bad {
			require.EqualError(t, err, `m.will_expire must be a whole number of seconds from 1 to 3600, or "expired" or "ended"`, test.content)
			continue
		}
		require.NoError(t, err, test.content)
		require.Equal(t, test.want, string(got))
		require.Equal(t, test.duration, duration, test.content)
	}
}

// FuzzParseContent checks what must hold for any request: a duration is never sent as the value of m.will_expire, and other content is
// returned unchanged.
func FuzzParseContent(f *testing.F) {
	for _, seed := range []string{
		`{"m.will_expire":10}`, `{"m.will_expire":"expired","body":"x"}`, `{"m\u002ewill_expire":10}`, `{"body":"m.will_expire"}`,
		`{"m.will_expire":1e3}`, `{"m.will_expire":{"m.will_expire":1}}`, `[{"m.will_expire":1}]`, "{\"m.will_expire\":\"\xff\"}",
		`{"a":"\ud800","m.will_expire":86400}`, `{"m.will_expire":10,"m.will_expire":11}`, `{"M.will_expire":10}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		got, duration, err := parseContent(content, 24*time.Hour)
		var sent map[string]any // the content that Dendrite would send
		isObject := utf8.Valid(got) && json.Unmarshal(got, &sent) == nil
		switch {
		case err != nil:
			var field *fieldError
			if !errors.As(err, &field) || got != nil || duration != 0 {
				t.Fatalf("%v, %q, %s", err, got, duration)
			}
		case duration == 0:
			if string(got) != string(content) {
				t.Fatalf("changed: %q", got)
			}
			if value, ok := sent[expireKey]; isObject && ok && value != "expired" && value != "ended" {
				t.Fatalf("%v gets through", value)
			}
		default:
			if duration < time.Second || duration > 24*time.Hour || duration%time.Second != 0 {
				t.Fatalf("the duration is %s", duration)
			}
			if !isObject || sent[expireKey] != "running" {
				t.Fatalf("not running: %q", got)
			}
		}
	})
}

func BenchmarkParseContentWithoutTheField(b *testing.B) {
	content := []byte(`{"msgtype":"m.text","body":"` + strings.Repeat("hello ", 100) + `"}`)
	b.SetBytes(int64(len(content)))
	for b.Loop() {
		_, _, _ = parseContent(content, time.Hour)
	}
}
