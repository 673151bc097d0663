package syncapi

import (
	"context"
	"fmt"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Roomserver is what the consumer asks the roomserver.
type Roomserver interface {
	api.QuerySenderIDAPI
	QueryEventsByID(ctx context.Context, req *api.QueryEventsByIDRequest, res *api.QueryEventsByIDResponse) error
	QueryStateAfterEvents(ctx context.Context, req *api.QueryStateAfterEventsRequest, res *api.QueryStateAfterEventsResponse) error
	QueryCurrentState(ctx context.Context, req *api.QueryCurrentStateRequest, res *api.QueryCurrentStateResponse) error
}

// onUnseenRedaction stops the timer of an event that a redaction takes back without Dendrite's noticing: the closing event would
// publish again what everybody else has deleted. Dendrite itself goes on showing the event, which cannot be mended from outside.
func (c *Consumer) onUnseenRedaction(ctx context.Context, redaction *types.HeaderedEvent) error {
	redacts := dendritefix.UnseenRedaction(redaction.PDU)
	if redacts == "" {
		return nil
	}
	var res api.QueryEventsByIDResponse
	if err := c.rsAPI.QueryEventsByID(ctx, &api.QueryEventsByIDRequest{
		RoomID: redaction.RoomID().String(), EventIDs: []string{redacts},
	}, &res); err != nil {
		return fmt.Errorf("looking up what is redacted: %w", err)
	}
	if len(res.Events) == 0 || res.Events[0].RoomID().String() != redaction.RoomID().String() {
		return nil
	}
	allowed, err := c.mayRedact(ctx, redaction.PDU, res.Events[0].PDU)
	if allowed {
		c.timers.DropEvent(ctx, redacts, expiration.Redacted)
	}
	return err
}

// mayRedact reports whether a redaction takes effect: users of a server redact whatever users of it have sent, others need the
// power to redact (rooms of version 3 and later).
func (c *Consumer) mayRedact(ctx context.Context, redaction, event gomatrixserverlib.PDU) (bool, error) {
	by, err := c.rsAPI.QueryUserIDForSender(ctx, redaction.RoomID(), redaction.SenderID())
	if err != nil || by == nil {
		return false, nil // the roomserver has accepted the event, so that is no passing fault
	}
	sender, err := c.rsAPI.QueryUserIDForSender(ctx, event.RoomID(), event.SenderID())
	if err == nil && sender != nil && sender.Domain() == by.Domain() {
		return true, nil
	}
	levels, err := c.powerLevels(ctx, redaction)
	if err != nil || levels == nil {
		return false, err
	}
	content, err := levels.PowerLevels()
	return err == nil && content.UserLevel(redaction.SenderID()) >= content.Redact, nil
}

// powerLevels returns the event with the power levels that an event was sent under, or nil.
func (c *Consumer) powerLevels(ctx context.Context, e gomatrixserverlib.PDU) (gomatrixserverlib.PDU, error) {
	tuple := gomatrixserverlib.StateKeyTuple{EventType: spec.MRoomPowerLevels}
	// The error can be another server's doing, and for ever: that the state is missing behind an event that is there. If the database is
	// the reason, what comes next fails too.
	var before api.QueryStateAfterEventsResponse
	err := c.rsAPI.QueryStateAfterEvents(ctx, &api.QueryStateAfterEventsRequest{
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
	// The events before it are not known here: what is the case now must do.
	var now api.QueryCurrentStateResponse
	if err := c.rsAPI.QueryCurrentState(ctx, &api.QueryCurrentStateRequest{
		RoomID: e.RoomID().String(), StateTuples: []gomatrixserverlib.StateKeyTuple{tuple},
	}, &now); err != nil {
		return nil, fmt.Errorf("looking up power levels: %w", err)
	}
	if levels := now.StateEvents[tuple]; levels != nil {
		return levels.PDU, nil
	}
	return nil, nil
}
