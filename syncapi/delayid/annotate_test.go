package delayid

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const alice = "@alice:localhost"

const (
	// aliceHasSent is what a delayed event of Alice's gets in unsigned.
	aliceHasSent = `"delay_id":"d1","org.matrix.msc4140.delay_id":"d1"`
)

// sentBy is a fake Sent. It has delay IDs by user ID and event ID.
type sentBy map[string]map[string]string

func (s sentBy) AnySent() bool            { return len(s) > 0 }
func (s sentBy) HasSent(user string) bool { return len(s[user]) > 0 }
func (s sentBy) DelayIDs(_ context.Context, user string, eventIDs []string) (map[string]string, error) {
	found := map[string]string{}
	for _, eventID := range eventIDs {
		if delayID, ok := s[user][eventID]; ok {
			found[eventID] = delayID
		}
	}
	return found, nil
}

func TestAddDelayIDs(t *testing.T) {
	sent := sentBy{alice: {"$1": "d1", "$2": `d"2`}, "@bob:localhost": {"$3": "d3"}}
	event := func(id, more string) string {
		return `{"event_id":"` + id + `","type":"m.x","content":{"n":9007199254740993.10}` + more + `}`
	}
	marked := func(more string) string {
		return `{"unsigned":{` + aliceHasSent + `},` + event("$1", more)[1:]
	}
	for name, test := range map[string]struct{ answer, want string }{
		"no unsigned":    {event("$1", ""), marked("")},
		"unsigned":       {event("$1", `,"unsigned":{"age":1e3}`), event("$1", `,"unsigned":{`+aliceHasSent+`,"age":1e3}`)},
		"empty unsigned": {event("$1", `,"unsigned":{ }`), event("$1", `,"unsigned":{`+aliceHasSent+` }`)},
		"null unsigned":  {event("$1", `, "unsigned" : null `), event("$1", `, "unsigned" : {`+aliceHasSent+`} `)},
		"said already by somebody else": {
			event("$1", `,"unsigned":{"delay_id":{"event_id":"$1","type":"","content":1},"age":1}`),
			event("$1", `,"unsigned":{"org.matrix.msc4140.delay_id":"d1","delay_id":"d1","age":1}`),
		},
		"both said already": {
			event("$1", `,"unsigned":{"delay_id":"x","org.matrix.msc4140.delay_id":7}`),
			event("$1", `,"unsigned":{"delay_id":"d1","org.matrix.msc4140.delay_id":"d1"}`),
		},
		"a delay ID that needs escaping": {
			event("$2", ""), `{"unsigned":{"delay_id":"d\"2","org.matrix.msc4140.delay_id":"d\"2"},` + event("$2", "")[1:],
		},
		"an event ID that is escaped": {
			`{"event_id":"\u00241","type":"m.x","content":{}}`,
			`{"unsigned":{` + aliceHasSent + `},"event_id":"\u00241","type":"m.x","content":{}}`,
		},
		"sender":                {event("$1", `,"sender":"`+alice+`"`), marked(`,"sender":"` + alice + `"`)},
		"pseudo ID":             {event("$1", `,"sender":"cHNldWRv"`), marked(`,"sender":"cHNldWRv"`)},
		"somebody else":         {event("$1", `,"sender":"@bob:localhost"`), ""},
		"somebody else's event": {event("$3", ""), ""},
		"an ordinary event":     {event("$4", ""), ""},
		"not an event":          {`{"event_id":"$1","type":"m.x"}`, ""},
		"a receipt":             {`{"type":"m.receipt","content":{"$1":{}},"event_id":1}`, ""},
		"in an event's content": {`{"type":"m.x","content":` + event("$1", "") + `}`, ""},
		"in the content of an event with an ID": {
			`{"event_id":"$4","type":"m.x","content":{"a":[` + event("$1", "") + `]},"unsigned":{"prev_content":` + event("$1", "") + `}}`, "",
		},
		"in the unsigned part of an event that is marked too": {
			`[` + event("$1", `,"unsigned":{"redacted_because":`+event("$1", `,"unsigned":{}`)+`}`) + `]`,
			`[` + event("$1", `,"unsigned":{`+aliceHasSent+`,"redacted_because":`+event("$1", `,"unsigned":{`+aliceHasSent+`}`)+`}`) + `]`,
		},
		"sync": {
			` {"next_batch":"s1","rooms":{"join":{"!r":{"timeline":{"events":[` + event("$4", "") + `, ` + event("$1", "") + `]},"state":{"events":[` + event("$1", "") + `]}}},"leave":{"!l":{"state_after":{"events":[` + event("$1", "") + `]}}}}} `,
			` {"next_batch":"s1","rooms":{"join":{"!r":{"timeline":{"events":[` + event("$4", "") + `, ` + marked("") + `]},"state":{"events":[` + marked("") + `]}}},"leave":{"!l":{"state_after":{"events":[` + marked("") + `]}}}}} `,
		},
		"messages": {`{"chunk":[` + event("$1", "") + `],"state":[` + event("$1", "") + `]}`, `{"chunk":[` + marked("") + `],"state":[` + marked("") + `]}`},
		"context": {
			`{"event":` + event("$1", "") + `,"events_before":[` + event("$1", "") + `],"events_after":[` + event("$1", "") + `],"state":[` + event("$1", "") + `]}`,
			`{"event":` + marked("") + `,"events_before":[` + marked("") + `],"events_after":[` + marked("") + `],"state":[` + marked("") + `]}`,
		},
		"in the relations of an event": {
			event("$4", `,"unsigned":{"m.relations":{"m.thread":{"latest_event":`+event("$1", "")+`,"count":1},"m.replace":`+event("$1", "")+`}}`),
			event("$4", `,"unsigned":{"m.relations":{"m.thread":{"latest_event":`+marked("")+`,"count":1},"m.replace":`+marked("")+`}}`),
		},
		"a list": {
			`[` + event("$1", "") + `,` + event("$4", "") + `]`, `[` + marked("") + `,` + event("$4", "") + `]`,
		},
		"search": {
			`{"search_categories":{"room_events":{"results":[{"rank":1,"result":` + event("$1", "") + `,"context":{"events_before":[` + event("$1", "") + `],"events_after":[` + event("$1", "") + `]}}],"state":{"!r":[` + event("$1", "") + `]},"groups":{"room_id":{"!r":{"results":["$1"]}}}}}}`,
			`{"search_categories":{"room_events":{"results":[{"rank":1,"result":` + marked("") + `,"context":{"events_before":[` + marked("") + `],"events_after":[` + marked("") + `]}}],"state":{"!r":[` + marked("") + `]},"groups":{"room_id":{"!r":{"results":["$1"]}}}}}}`,
		},
		"a stripped event": {`{"invite_state":{"events":[{"type":"m.x","content":{},"state_key":"","sender":"` + alice + `"}]}}`, ""},
		// Dendrite gives a redaction so in what /state and /members show: as another server would get it, without its event ID.
		"a redaction without event ID": {
			event("$4", `,"unsigned":{"redacted_by":"$1","redacted_because":{"EventNID":1,"PDU":{"type":"m.room.redaction","content":{}}}}`), "",
		},
		"too deep":     {strings.Repeat("[", 1000) + event("$1", "") + strings.Repeat("]", 1000), ""},
		"not JSON":     {event("$1", "") + "x", ""},
		"nothing":      {"", ""},
		"not a object": {`"$1"`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if test.want == "" {
				test.want = test.answer
			}
			got, err := addDelayIDs(t.Context(), sent, alice, []byte(test.answer))
			require.NoError(t, err)
			require.Equal(t, test.want, string(got))
		})
	}
}

// asked is a fake Sent in which all events are delayed events. Its method DelayIDs may be called once.
type asked struct {
	sentBy
	eventIDs []string
	err      error
}

func (a *asked) DelayIDs(_ context.Context, _ string, eventIDs []string) (map[string]string, error) {
	if a.eventIDs != nil {
		return nil, errors.New("asked twice")
	}
	a.eventIDs = eventIDs
	found := map[string]string{}
	for _, eventID := range eventIDs {
		found[eventID] = "d1"
	}
	return found, a.err
}

func TestAddDelayIDsAsksOnce(t *testing.T) {
	event := func(id string) string { return `{"event_id":"` + id + `","type":"m.x","content":{}}` }
	answer := `[` + event("$1") + `,` + event("$2") + `,` + event("$1") + `]`
	sent := &asked{}
	got, err := addDelayIDs(t.Context(), sent, alice, []byte(answer))
	require.NoError(t, err)
	require.ElementsMatch(t, []string{"$1", "$2"}, sent.eventIDs)
	require.Equal(t, 3, strings.Count(string(got), aliceHasSent))

	sent = &asked{err: errors.New("broken")}
	got, err = addDelayIDs(t.Context(), sent, alice, []byte(answer))
	require.Error(t, err)
	require.Equal(t, answer, string(got), "an error leaves the answer as it was")

	sent = &asked{}
	_, err = addDelayIDs(t.Context(), sent, alice, []byte(`{"chunk":[]}`))
	require.NoError(t, err)
	require.Nil(t, sent.eventIDs, "nothing to ask for")
}

// FuzzAddDelayIDs checks that addDelayIDs changes nothing but the two fields.
func FuzzAddDelayIDs(f *testing.F) {
	f.Add([]byte(`{"rooms":{"join":{"!r":{"timeline":{"events":[{"event_id":"$1","type":"t","content":{"n":1.0e3},"unsigned":{"age":3}}]}}}}}`))
	f.Add([]byte(`{"chunk":[{"event_id":"$1","type":"t","content":{},"unsigned":{"redacted_because":{"event_id":"$2","type":"t","content":0}}}]}`))
	f.Add([]byte(` [{"event_id":"$1","type":"t","content":[],"unsigned":null},{"event_id":"\u0024","type":"t","content":{"event_id":"$1","type":"t","content":1}}]`))
	f.Add([]byte(`{"unsigned":{"delay_id":[],"x":1,"delay_id":{}},"unsigned":{"org.matrix.msc4140.delay_id":0},"event_id":"$1","type":"t","content":1}`))
	f.Fuzz(func(t *testing.T, answer []byte) {
		before := slices.Clone(answer)
		got, err := addDelayIDs(t.Context(), sentBy{alice: {}}, alice, answer)
		require.NoError(t, err)
		require.Equal(t, before, got, "without delay IDs")

		got, err = addDelayIDs(t.Context(), &asked{}, alice, answer)
		require.NoError(t, err)
		require.Equal(t, before, answer, "the answer is not written to")
		if !json.Valid(answer) {
			return // Dendrite never answers this, so it is enough that addDelayIDs does not panic
		}
		require.True(t, json.Valid(got), "%s", got)
		expected, actual := decode(t, answer), decode(t, got)
		mark(expected, 0)
		require.Equal(t, expected, actual)
	})
}

func decode(t *testing.T, data []byte) (value any) {
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	require.NoError(t, d.Decode(&value))
	return value
}

// mark does to decoded JSON what addDelayIDs does to an answer whose events are all delayed events.
func mark(value any, depth int) {
	if depth > maxDepth {
		return
	}
	switch value := value.(type) {
	case []any:
		for _, element := range value {
			mark(element, depth+1)
		}
	case map[string]any:
		for key, field := range value {
			_, isArray := field.([]any)
			if !slices.Contains([]string{"content", "prev_content", "delay_id", "org.matrix.msc4140.delay_id"}, key) && !(key == "unsigned" && isArray) {
				mark(field, depth+1)
			}
		}
		_, hasID := value["event_id"].(string)
		_, hasType := value["type"].(string)
		_, hasContent := value["content"]
		sender, _ := value["sender"].(string)
		if !hasID || !hasType || !hasContent || strings.HasPrefix(sender, "@") && sender != alice {
			return
		}
		unsigned, ok := value["unsigned"].(map[string]any)
		if !ok {
			unsigned = map[string]any{}
			value["unsigned"] = unsigned
		}
		unsigned["delay_id"], unsigned["org.matrix.msc4140.delay_id"] = "d1", "d1"
	}
}

// BenchmarkAddDelayIDs uses an answer like that of the first sync of a user with many rooms.
func BenchmarkAddDelayIDs(b *testing.B) {
	var answer bytes.Buffer
	answer.WriteString(`{"rooms":{"join":{`)
	for room := range 200 {
		fmt.Fprintf(&answer, `%s"!room%d:localhost":{"timeline":{"events":[`, strings.Repeat(",", min(room, 1)), room)
		for i := range 100 {
			fmt.Fprintf(&answer, `%s{"event_id":"$%d-%d","sender":"@user%d:localhost","type":"m.room.message","content":{"body":%q},"origin_server_ts":1700000000000,"unsigned":{"age":12345}}`,
				strings.Repeat(",", min(i, 1)), room, i, i%10, strings.Repeat("x", 200))
		}
		answer.WriteString(`]}}`)
	}
	answer.WriteString(`}}}`)
	sent := sentBy{"@user1:localhost": {"$1-1": "d1"}}
	b.SetBytes(int64(answer.Len()))
	for b.Loop() {
		if _, err := addDelayIDs(b.Context(), sent, "@user1:localhost", answer.Bytes()); err != nil {
			b.Fatal(err)
		}
	}
}
