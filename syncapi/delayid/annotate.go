package delayid

import (
	"bytes"
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/tidwall/gjson"
)

// delayIDKeys are the fields in unsigned that have the delay ID.
var delayIDKeys = [...]string{"delay_id", "org.matrix.msc4140.delay_id"}

// maxDepth is how deep in an answer events are looked for. Events in the timeline of a sync lie at 6, events in the
// unsigned part of others a few deeper.
const maxDepth = 16

// sentEvent is where an event lies in an answer, in bytes.
type sentEvent struct {
	eventID string
	inside  int // behind its opening brace
	// unsigned does not exist if the event has none.
	unsigned gjson.Result
}

// edit replaces the bytes of an answer from start to end.
type edit struct {
	start, end int
	text       string
}

// addDelayIDs returns an answer with the delay IDs of the events that the user sent as delayed events. Everything else
// stays as it is, byte for byte. With an error the answer is unchanged.
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

// appendEvents adds the events that userID may have sent. It looks for them everywhere but in the contents of events,
// where anybody can write what looks like one.
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
	// In rooms with pseudo IDs, which are no user IDs, the sender may be anybody.
	if strings.HasPrefix(sender.Str, "@") && sender.Str != userID {
		return events
	}
	event.eventID = eventID.Str
	return append(events, event)
}

// appendEdits adds what gives the event a delay ID. Events inside of this one's unsigned part have edits of their own, and
// none of them overlaps.
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
