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

// From room version 11 on, the content of a redaction names the redacted event (MSC2174). Dendrite looks beside the content in all versions:
// it does not notice what other servers redact. Its own redactions have both. Dendrite goes on showing the event, which cannot be mended
// from outside; but the event is not published again by what this server sends.
//
// This file can go when gomatrixserverlib's PDU.Redacts reads the content in such rooms.

// RedactsInContent reports whether the content of a redaction names the redacted event in a room version. It finds out from what remains of a
// redacted redaction, so that there is no list of versions here. It is false for an unknown version.
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

// UnseenRedaction returns the ID of the event that a redaction takes back without Dendrite's noticing, or "". The redaction must be allowed,
// and the event known.
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

// namedInContent returns the ID of the event that the content of a redaction names and Dendrite does not see, or "".
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

// mayRedact reports whether a redaction takes effect: a user may redact the events of all users of the same server, and other events with the
// power to redact (rooms of version 3 and later).
func mayRedact(
	ctx context.Context, rsAPI RedactionRoomserver, redaction, event gomatrixserverlib.PDU,
) (bool, error) {
	by, err := rsAPI.QueryUserIDForSender(ctx, redaction.RoomID(), redaction.SenderID())
	if err != nil || by == nil {
		return false, nil // the roomserver has accepted the event, so that is no passing fault
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

// powerLevels returns the event with the power levels under which an event was sent, or nil.
func powerLevels(ctx context.Context, rsAPI RedactionRoomserver, e gomatrixserverlib.PDU) (gomatrixserverlib.PDU, error) {
	tuple := gomatrixserverlib.StateKeyTuple{EventType: spec.MRoomPowerLevels}
	// The error may be permanent, and another server's doing: the state is missing behind a known event. If the database is the cause, the
	// next query fails too.
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
