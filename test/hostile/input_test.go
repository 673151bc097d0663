//go:build all

package hostile

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"
)

// input is one action of a hostile user: an event that is delayed or expires, and a further action before it is due. It is stored as JSON,
// and can be replayed with other rooms and users on another server.
type input struct {
	// Name says why the input is kept. The name of a generated input has its seed and its index.
	Name    string `json:"name"`
	Version string `json:"room_version"`
	// Room, percent-encoded, replaces the ID of a room in the path.
	Room string `json:"room,omitempty"`
	Form form   `json:"form"`
	// Type and StateKey are percent-encoded as in a path, because they need not be UTF-8.
	Type     string  `json:"type"`
	StateKey *string `json:"state_key,omitempty"`
	// Content may have placeholders, and so may Type and StateKey, see expand.
	Content string `json:"content"`
	// DelayMS is the delay in milliseconds. The form expiring ignores it.
	DelayMS int `json:"delay_ms,omitempty"`
	// Expires is the value of m.will_expire in the content, in seconds. A value of 0 leaves the field out.
	Expires   int    `json:"expires,omitempty"`
	Timestamp string `json:"ts,omitempty"`
	// Repeat means that the request is sent twice, with the same transaction ID if it has one.
	Repeat bool `json:"repeat,omitempty"`
	// Action is performed AfterMS milliseconds after the answer.
	Action  string `json:"action,omitempty"`
	AfterMS int    `json:"after_ms,omitempty"`
}

// form is the way in which an event is sent.
type form string

const (
	expiring  form = "expiring"  // a send with m.will_expire in the content
	query     form = "query"     // a send with the delay in the query
	dedicated form = "dedicated" // the merged form, on the stable path
	unstable  form = "unstable"  // the merged form, on the unstable path
)

func (in *input) String() string {
	var text strings.Builder
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false) // to keep placeholders readable
	_ = encoder.Encode(in)
	return strings.TrimSpace(text.String())
}

// place has the values of the placeholders <room>, <me> and <other>.
type place struct {
	room, me, other string
}

var (
	nesting = regexp.MustCompile(`"<(nest|obj):(\d+)>"`)
	padding = regexp.MustCompile(`<pad:(\d+)>`)
	rawByte = regexp.MustCompile(`<byte:([0-9a-f]{2})>`)
)

// expand replaces the placeholders. "<nest:N>" and "<obj:N>", with their quotes, become N nested arrays or objects. <pad:N> becomes N
// characters, and <byte:ff> becomes this byte. The names of a place become its values.
func (p place) expand(s string) string {
	s = nesting.ReplaceAllStringFunc(s, func(m string) string {
		found := nesting.FindStringSubmatch(m)
		n, _ := strconv.Atoi(found[2])
		if found[1] == "nest" {
			return strings.Repeat("[", n) + strings.Repeat("]", n)
		}
		return strings.Repeat(`{"a":`, n) + "1" + strings.Repeat("}", n)
	})
	s = padding.ReplaceAllStringFunc(s, func(m string) string {
		n, _ := strconv.Atoi(padding.FindStringSubmatch(m)[1])
		return strings.Repeat("a", n)
	})
	s = rawByte.ReplaceAllStringFunc(s, func(m string) string {
		b, _ := hex.DecodeString(rawByte.FindStringSubmatch(m)[1])
		return string(b)
	})
	return strings.NewReplacer("<room>", p.room, "<me>", p.me, "<other>", p.other).Replace(s)
}

// request returns path and body of the request that sends the event.
func (in *input) request(p place, txn string) (path string, body []byte) {
	content := p.expand(in.Content)
	if in.Expires != 0 {
		content = withField(content, "m.will_expire", strconv.Itoa(in.Expires))
	}
	parameters := url.Values{}
	if in.Timestamp != "" {
		parameters.Set("ts", in.Timestamp)
	}
	switch in.Form {
	case dedicated, unstable:
		path = "/_matrix/client/v3"
		if in.Form == unstable {
			path = "/_matrix/client/unstable/org.matrix.msc4140"
		}
		path += "/rooms/" + in.room(p) + "/delayed_event/" + p.expand(in.Type) + "/" + txn
		body = fmt.Appendf(nil, `{"delay_ms":%d,"content":%s`, in.DelayMS, content)
		if in.StateKey != nil {
			key, _ := url.PathUnescape(p.expand(*in.StateKey))
			body = append(append(body, `,"state_key":`...), quote(key)...)
		}
		body = append(body, '}')
	default:
		path, body = in.plainPath(p, txn), []byte(content)
		if in.Form == query {
			parameters.Set("org.matrix.msc4140.delay", strconv.Itoa(in.DelayMS))
		}
	}
	if len(parameters) > 0 {
		path += "?" + parameters.Encode()
	}
	return path, body
}

// plain returns path and body of a plain send of the same event.
func (in *input) plain(p place, txn string) (path string, body []byte) {
	return in.plainPath(p, txn), []byte(p.expand(in.Content))
}

func (in *input) plainPath(p place, txn string) string {
	path := "/_matrix/client/v3/rooms/" + in.room(p)
	if in.StateKey != nil {
		return path + "/state/" + p.expand(in.Type) + "/" + p.expand(*in.StateKey)
	}
	return path + "/send/" + p.expand(in.Type) + "/" + txn
}

func (in *input) room(p place) string {
	if in.Room != "" {
		return in.Room
	}
	return url.PathEscape(p.room)
}

// withField adds a field at the beginning of an object. Text that is not an object stays as it is.
func withField(object, key, value string) string {
	rest, ok := strings.CutPrefix(object, "{")
	if !ok {
		return object
	}
	field := `{"` + key + `":` + value
	if !strings.HasPrefix(strings.TrimSpace(rest), "}") {
		field += ","
	}
	return field + rest
}

// quote returns a string as JSON. Bytes that are not UTF-8 stay as they are.
func quote(s string) []byte {
	if utf8.ValidString(s) {
		data, _ := json.Marshal(s)
		return data
	}
	quoted := []byte{'"'}
	for i := range len(s) {
		if s[i] < ' ' || s[i] == '"' || s[i] == '\\' {
			quoted = fmt.Appendf(quoted, `\u%04x`, s[i])
		} else {
			quoted = append(quoted, s[i])
		}
	}
	return append(quoted, '"')
}
