package dendritefix

import (
	"encoding/json"

	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/tidwall/gjson"
)

// RedactsInContent reports whether in a room version the content of a redaction says what it redacts, and not a field beside it.
// From room version 11 on it does (MSC2174), and Dendrite looks beside it in all versions. Dendrite's own redactions have both.
//
// What tells the versions apart is what a redacted redaction keeps, so that no list of versions stands here. An unknown version
// has no such content.
//
// This can go when gomatrixserverlib's PDU.Redacts knows of it.
func RedactsInContent(version gomatrixserverlib.RoomVersion) bool {
	v, err := gomatrixserverlib.GetRoomVersion(version)
	if err != nil {
		return false
	}
	kept, err := v.RedactEventJSON([]byte(`{"type":"` + spec.MRoomRedaction + `","content":{"redacts":"$event"}}`))
	return err == nil && gjson.GetBytes(kept, "content.redacts").Exists()
}

// UnseenRedaction returns the ID of the event that an event redacts without Dendrite's noticing, or "". Whether the redaction is
// allowed is not looked at.
func UnseenRedaction(e gomatrixserverlib.PDU) string {
	if e.Type() != spec.MRoomRedaction || e.StateKey() != nil || !RedactsInContent(e.Version()) {
		return ""
	}
	var content struct {
		Redacts string `json:"redacts"`
	}
	if err := json.Unmarshal(e.Content(), &content); err != nil || content.Redacts == e.Redacts() {
		return ""
	}
	return content.Redacts
}
