package delayid

import (
	"bytes"
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/tidwall/gjson"
)

// delayIDKeys are the fields of unsigned that hold the delay ID.
var delayIDKeys = [...]string{"delay_id", "org.matrix.msc4140.delay_id"}

// maxDepth is how many levels deep in an answer events are looked for. The events of a sync's timeline are at level 6, and events in the
// unsigned part of other events are a few levels deeper.
const maxDepth = 16

// sentEvent is an event and its place in an answer, in bytes from the start.
type sentEvent struct {
	eventID string
	inside  int // the place after its opening brace
	// unsigned is the field of that name; its method Exists returns false if the event has none.
	unsigned gjson.Result
}

// edit replaces the bytes of an answer from start up to end, without end.
type edit struct {
	start, end int
	text       string
}

// addDelayIDs adds to an answer the delay IDs of the events that the user sent as delayed events. Everything else stays the same, byte for
// byte. With an error it returns the answer unchanged.
func addDelayIDs(ctx context.Context, sent Sent, userID string, answer []byte) ([]byte, error) {
	if !gjson.ValidBytes(answer) {
		return answer, nil
	}
	events := appendEvents(nil, gjson.ParseBytes(answer), userID, 0)
	if len(events) == 0 {
		return answer, nil
	}
	eventIDs := map[string]struct{}{}
	for _, event := range events {
		eventIDs[event.eventID] = struct{}{}
	}
	delayIDs, err := sent.DelayIDs(ctx, userID, slices.Collect(maps.Keys(eventIDs)))
	if err != nil {
		return answer, err
	}
	var edits []edit
	for _, event := range events {
		if delayID, ok := delayIDs[event.eventID]; ok {
			edits = event.appendEdits(edits, delayID)
		}
	}
	return apply(answer, edits), nil
}

// appendEvents adds the events in value that userID may have sent. It does not look into the contents of events, where any client can write
// what looks like an event.
func appendEvents(events []sentEvent, value gjson.Result, userID string, depth int) []sentEvent {
	if depth > maxDepth {
		return events
	}
	event := sentEvent{inside: value.Index + 1}
	var eventID, eventType, sender gjson.Result
	hasContent := false
	value.ForEach(func(key, field gjson.Result) bool {
		switch key.Str {
		case "event_id":
			eventID = field
		case "type":
			eventType = field
		case "sender":
			sender = field
		case "unsigned":
			event.unsigned = field
			if !field.IsObject() {
				return true
			}
		case "content":
			hasContent = true
			return true
		case "prev_content", delayIDKeys[0], delayIDKeys[1]:
			return true
		}
		if field.IsObject() || field.IsArray() {
			events = appendEvents(events, field, userID, depth+1)
		}
		return true
	})
	if eventID.Type != gjson.String || eventType.Type != gjson.String || !hasContent {
		return events
	}
	// A sender without an @ is a pseudo ID, which may belong to any user.
	if strings.HasPrefix(sender.Str, "@") && sender.Str != userID {
		return events
	}
	event.eventID = eventID.Str
	return append(events, event)
}

// appendEdits adds the edits that give the event a delay ID. Events inside this event's unsigned part have edits of their own. No two edits
// overlap.
func (e *sentEvent) appendEdits(edits []edit, delayID string) []edit {
	value := string(gjson.AppendJSONString(nil, delayID))
	present := map[string]gjson.Result{}
	if e.unsigned.IsObject() {
		e.unsigned.ForEach(func(key, field gjson.Result) bool {
			present[key.Str] = field
			return true
		})
	}
	var missing []string
	for _, key := range delayIDKeys {
		if field, ok := present[key]; ok {
			edits = append(edits, edit{field.Index, field.Index + len(field.Raw), value})
		} else {
			missing = append(missing, `"`+key+`":`+value)
		}
	}
	text, start := strings.Join(missing, ","), e.unsigned.Index
	switch {
	case len(missing) == 0:
		return edits
	case !e.unsigned.Exists():
		return append(edits, edit{e.inside, e.inside, `"unsigned":{` + text + `},`})
	case !e.unsigned.IsObject(): // null
		return append(edits, edit{start, start + len(e.unsigned.Raw), "{" + text + "}"})
	case len(present) > 0:
		text += ","
	}
	return append(edits, edit{start + 1, start + 1, text})
}

// apply makes edits that do not overlap.
func apply(answer []byte, edits []edit) []byte {
	if len(edits) == 0 {
		return answer
	}
	slices.SortFunc(edits, func(a, b edit) int { return a.start - b.start })
	var edited bytes.Buffer
	edited.Grow(len(answer) + 128*len(edits))
	last := 0
	for _, e := range edits {
		edited.Write(answer[last:e.start])
		edited.WriteString(e.text)
		last = e.end
	}
	edited.Write(answer[last:])
	return edited.Bytes()
}
