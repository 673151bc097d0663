package roomserver

import (
	"encoding/json"

	"github.com/matrix-org/gomatrixserverlib"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/eventsize"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

const (
	// expireKey says in an event's content whether it is running, expired or ended.
	expireKey = "m.will_expire"
	// relatesToKey is the draft's key for the relation of a closing event to its original.
	relatesToKey = "m.relates_to"
	// expireRelType is the type of that relation.
	expireRelType = "m.expire.relationship"
)

// closingContent returns the content of a closing event.
func closingContent(original []byte, eventID string, o expiration.Outcome) ([]byte, error) {
	return withFields(original, map[string]any{
		expireKey: o, relatesToKey: map[string]string{"event_id": eventID, "rel_type": expireRelType},
	})
}

// runningContent returns the content of an event that starts to run: it replaces the duration by "running".
func runningContent(content []byte) ([]byte, error) {
	return withFields(content, map[string]any{expireKey: expiration.Running})
}

// withFields returns the content with these fields, in place of those that it has.
func withFields(content []byte, set map[string]any) ([]byte, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(content, &fields); err != nil {
		return nil, err
	}
	for key, value := range set {
		data, err := json.Marshal(value)
		if err != nil {
			return nil, err
		}
		fields[key] = data
	}
	return json.Marshal(fields)
}

// isRunning reports whether the content of an expiring event says that it is running. A redacted event has lost that content.
func isRunning(e gomatrixserverlib.PDU) bool {
	var content map[string]json.RawMessage
	if err := json.Unmarshal(e.Content(), &content); err != nil {
		return false
	}
	return gjson.ParseBytes(content[expireKey]).Str == expiration.Running
}

// closable reports whether the closing event of e certainly fits into the size limit, with as many prev events and auth events as it can
// have.
func closable(e gomatrixserverlib.PDU) bool {
	content, err := closingContent(e.Content(), e.EventID(), expiration.Expired)
	if err != nil {
		return false
	}
	if content, err = gomatrixserverlib.CanonicalJSON(content); err != nil {
		return false
	}
	return eventsize.Fits(e, len(content))
}
