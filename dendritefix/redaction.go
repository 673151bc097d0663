package dendritefix

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/tidwall/gjson"
)

// From room version 11 on, the content of a redaction names the redacted event (MSC2174). Dendrite looks outside of the content in all
// versions, so it misses the redactions of other servers. Its own redactions name the event in both places. Dendrite goes on showing a
// redacted event, which cannot be fixed from outside. But no event that this server sends publishes it again.
//
// This file can go when gomatrixserverlib's PDU.Redacts reads the content in such rooms.

// RedactsInContent reports whether the content of a redaction names the redacted event in a room version. It redacts a sample redaction and
// checks whether the field is kept, so that no list of versions is needed. It is false for an unknown version.
func RedactsInContent(version gomatrixserverlib.RoomVersion) bool {
	v, err := gomatrixserverlib.GetRoomVersion(version)
	if err != nil {
		return false
	}
	kept, err := v.RedactEventJSON([]byte(`{"type":"` + spec.MRoomRedaction + `","content":{"redacts":"$event"}}`))
	return err == nil && gjson.GetBytes(kept, "content.redacts").Exists()
}

// RedactionRoomserver is the part of the roomserver that UnseenRedaction queries.
type RedactionRoomserver interface {
	QueryUserIDForSender(ctx context.Context, roomID spec.RoomID, senderID spec.SenderID) (*spec.UserID, error)
	QueryEventsByID(ctx context.Context, req *api.QueryEventsByIDRequest, res *api.QueryEventsByIDResponse) error
	QueryStateAfterEvents(ctx context.Context, req *api.QueryStateAfterEventsRequest, res *api.QueryStateAfterEventsResponse) error
	QueryCurrentState(ctx context.Context, req *api.QueryCurrentStateRequest, res *api.QueryCurrentStateResponse) error
}

// UnseenRedaction returns the ID of the event that a redaction redacts without Dendrite noticing. It returns "" if there is none, if the
// redaction is not allowed, or if this server does not know the event.
func UnseenRedaction(ctx context.Context, rsAPI RedactionRoomserver, redaction gomatrixserverlib.PDU) (string, error) {
	redacts := namedInContent(redaction)
	if redacts == "" {
		return "", nil
	}
	var res api.QueryEventsByIDResponse
	if err := rsAPI.QueryEventsByID(ctx, &api.QueryEventsByIDRequest{
		RoomID: redaction.RoomID().String(), EventIDs: []string{redacts},
	}, &res); err != nil {
		return "", fmt.Errorf("looking up a redacted event: %w", err)
	}
	if len(res.Events) == 0 || res.Events[0].RoomID().String() != redaction.RoomID().String() {
		return "", nil
	}
	if allowed, err := mayRedact(ctx, rsAPI, redaction, res.Events[0].PDU); err != nil || !allowed {
		return "", err
	}
	return redacts, nil
}

// namedInContent returns the ID of the event that the content of a redaction names, or "" if Dendrite sees it too.
func namedInContent(e gomatrixserverlib.PDU) string {
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

// mayRedact reports whether a redaction takes effect. In rooms of version 3 and later, a user may redact the events of all users of the
// same server. For other events, the user needs the power to redact.
func mayRedact(
	ctx context.Context, rsAPI RedactionRoomserver, redaction, event gomatrixserverlib.PDU,
) (bool, error) {
	by, err := rsAPI.QueryUserIDForSender(ctx, redaction.RoomID(), redaction.SenderID())
	if err != nil || by == nil {
		return false, nil // not a passing fault, because the roomserver has accepted the event
	}
	sender, err := rsAPI.QueryUserIDForSender(ctx, event.RoomID(), event.SenderID())
	if err == nil && sender != nil && sender.Domain() == by.Domain() {
		return true, nil
	}
	levels, err := powerLevels(ctx, rsAPI, redaction)
	if err != nil || levels == nil {
		return false, err
	}
	content, err := levels.PowerLevels()
	return err == nil && content.UserLevel(redaction.SenderID()) >= content.Redact, nil
}

// powerLevels returns the power levels event under which an event was sent, or nil.
func powerLevels(ctx context.Context, rsAPI RedactionRoomserver, e gomatrixserverlib.PDU) (gomatrixserverlib.PDU, error) {
	tuple := gomatrixserverlib.StateKeyTuple{EventType: spec.MRoomPowerLevels}
	// This error is not returned, because it may be permanent and caused by another server: the state after a known event can be missing.
	// If the database is the cause, the next query fails too.
	var before api.QueryStateAfterEventsResponse
	err := rsAPI.QueryStateAfterEvents(ctx, &api.QueryStateAfterEventsRequest{
		RoomID: e.RoomID().String(), PrevEventIDs: e.PrevEventIDs(), StateToFetch: []gomatrixserverlib.StateKeyTuple{tuple},
	}, &before)
	for _, state := range before.StateEvents {
		if state.Type() == spec.MRoomPowerLevels && state.StateKeyEquals("") {
			return state.PDU, nil
		}
	}
	if err == nil && before.PrevEventsExist {
		return nil, nil
	}
	// The prev events are not known here, so the current power levels count.
	var now api.QueryCurrentStateResponse
	if err := rsAPI.QueryCurrentState(ctx, &api.QueryCurrentStateRequest{
		RoomID: e.RoomID().String(), StateTuples: []gomatrixserverlib.StateKeyTuple{tuple},
	}, &now); err != nil {
		return nil, fmt.Errorf("looking up power levels: %w", err)
	}
	if levels := now.StateEvents[tuple]; levels != nil {
		return levels.PDU, nil
	}
	return nil, nil
}
