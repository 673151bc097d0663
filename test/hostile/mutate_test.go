//go:build all

package hostile

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
)

// weird are values of unexpected types. A string that contains a placeholder is expanded, including its quotes.
var weird = []string{
	`null`, `true`, `false`, `0`, `1`, `-1`, `100`, `"100"`, `" 100 "`, `"x"`, `""`, `[]`, `{}`, `[1]`, `{"a":1}`, `["<other>"]`, `{"<other>":100}`,
	`9007199254740991`, `9007199254740992`, `-9007199254740992`, `9223372036854775807`, `9223372036854775808`, `1e3`, `1e400`, `-1e400`, `1.5`, `-0`,
	`0.0`, `100000000000000000000000000000000000000000`, `"\u0000"`, `"\ud800"`, `"é"`, `"$notbase64"`, `"<me>"`, `"<other>"`, `"<room>"`,
	`"join"`, `"leave"`, `"ban"`, `"invite"`, `"knock"`, `"public"`, `"private"`, `"knock_restricted"`, `"world_readable"`,
	`"<nest:10>"`, `"<nest:150>"`, `"<obj:10>"`, `"<obj:150>"`, `"<pad:300>"`,
}

// deep are values with more nesting than the server, or most clients, can decode.
var deep = []string{`"<nest:250>"`, `"<obj:1000>"`, `"<nest:9990>"`, `"<nest:10001>"`, `"<nest:15000>"`, `"<obj:9990>"`, `"<obj:13000>"`}

// hostileContent spoils valid content in one or several ways.
func hostileContent(r *rand.Rand, content string) string {
	switch n := r.IntN(100); {
	case n < 20: // unchanged
	case n < 70:
		var value any
		if json.Unmarshal([]byte(content), &value) == nil {
			for range 1 + r.IntN(3) {
				value = mutate(r, value)
			}
			data, _ := json.Marshal(value)
			content = unmark(string(data))
		}
	case n < 76:
		content = withField(content, "deep", pick(r, deep))
	case n < 84: // about the maximum size of an event
		content = withField(content, "pad", fmt.Sprintf(`"<pad:%d>"`, 60_000+r.IntN(10_000)))
	case n < 90: // a duplicate key
		var fields map[string]any
		_ = json.Unmarshal([]byte(content), &fields)
		if keys := sortedKeys(fields); len(keys) > 0 {
			content = withField(content, pick(r, keys), pick(r, weird))
		}
	case n < 94:
		content = withField(content, "m.will_expire", pick(r, append([]string{`"running"`, `"expired"`, `"ended"`, `2`, `86401`}, weird...)))
	default:
		content = spoil(r, content)
	}
	return content
}

// spoil returns text that need not be an object, or even JSON.
func spoil(r *rand.Rand, content string) string {
	at := r.IntN(len(content))
	switch r.IntN(8) {
	case 0:
		return pick(r, weird)
	case 1:
		return ""
	case 2:
		return content[:at]
	case 3:
		return content + pick(r, []string{"}", "x", "{}", "\x00", " \n\t "})
	case 4:
		return content[:at] + fmt.Sprintf("<byte:%02x>", r.IntN(256)) + content[at+1:]
	case 5:
		return "\ufeff" + content
	case 6:
		return strings.ReplaceAll(content, `"`, "\u201c")
	default:
		return strings.ReplaceAll(content, ":", " :\n\t")
	}
}

// mark surrounds JSON text inside a string. unmark replaces the string by the text.
const mark = "\u2603"

func unmark(s string) string {
	parts := strings.Split(s, `"`+mark)
	for i, part := range parts[1:] {
		raw, rest, _ := strings.Cut(part, mark+`"`)
		var text string
		_ = json.Unmarshal([]byte(`"`+raw+`"`), &text)
		parts[i+1] = text + rest
	}
	return strings.NewReplacer(`\u003c`, "<", `\u003e`, ">").Replace(strings.Join(parts, ""))
}

// mutate replaces one value inside of another by a weird one, or removes or adds a value.
func mutate(r *rand.Rand, value any) any {
	odd := mark + pick(r, weird) + mark
	switch value := value.(type) {
	case map[string]any:
		keys := sortedKeys(value)
		if len(keys) == 0 {
			return map[string]any{"x": odd}
		}
		key := pick(r, keys)
		switch r.IntN(6) {
		case 0:
			delete(value, key)
		case 1:
			value[pick(r, []string{"", "x", "\x00", "<other>", "@nobody", strings.Repeat("k", 300)})] = odd
		case 2:
			value[key] = odd
		default:
			value[key] = mutate(r, value[key])
		}
		return value
	case []any:
		if len(value) == 0 || r.IntN(3) == 0 {
			return append(value, odd)
		}
		i := r.IntN(len(value))
		value[i] = mutate(r, value[i])
		return value
	default:
		return odd
	}
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
