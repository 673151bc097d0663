package roomserver

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/matrix-org/dendrite/clientapi/routing"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Closer sends closing events. It implements expiration.Roomserver.
type Closer struct {
	cfg   *config.ClientAPI
	rsAPI *API
}

var _ expiration.Roomserver = (*Closer)(nil)

// NewCloser returns a sender of closing events. They pass through the wrapper, like all others.
func NewCloser(cfg *config.ClientAPI, rsAPI *API) *Closer {
	return &Closer{cfg: cfg, rsAPI: rsAPI}
}

// Close implements expiration.Roomserver. The closing event is sent the way a client's event is, so power levels, pseudo
// IDs and room versions are Dendrite's own business.
func (c *Closer) Close(
	ctx context.Context, e expiration.Event, o expiration.Outcome, sent time.Time,
	claim func(context.Context, expiration.SignedEvent) error,
) error {
	if err := c.checkSender(ctx, e); err != nil {
		return err
	}
	original, err := c.original(ctx, e)
	if err != nil {
		return err
	}
	content, err := closingContent(original.Content(), e.ID, o)
	if err != nil {
		return fmt.Errorf("making the content of a closing event: %w", err)
	}
	return c.send(ctx, e, content, sent, claim)
}

func (c *Closer) send(
	ctx context.Context, e expiration.Event, content []byte, sent time.Time,
	claim func(context.Context, expiration.SignedEvent) error,
) error {
	hook := &expiration.Hook{Before: func(ctx context.Context, b expiration.Built) error {
		// What came since Close looked, and takes no part in the locks, is now among what the closing event is built on.
		if _, err := c.original(ctx, e); err != nil {
			return err
		}
		return claim(ctx, b.Signed())
	}}
	// As an application service says when an event was sent.
	target := "/?ts=" + strconv.FormatInt(sent.UnixMilli(), 10)
	req, err := http.NewRequestWithContext(expiration.WithHook(ctx, hook), http.MethodPut, target, bytes.NewReader(content))
	if err != nil {
		return err
	}
	device := &userapi.Device{UserID: e.Sender}
	res := routing.SendEvent(req, device, e.RoomID, e.Type, nil, e.StateKey, c.cfg, c.rsAPI, nil)
	switch {
	case hook.Err != nil:
		return hook.Err
	case res.Code == http.StatusOK && hook.Called:
		return nil
	}
	cause := fmt.Errorf("sending a closing event: HTTP %d: %v", res.Code, res.JSON)
	switch res.Code {
	case http.StatusForbidden, http.StatusRequestEntityTooLarge:
		return &expiration.DropError{Reason: expiration.Forbidden, Cause: cause}
	case http.StatusNotFound:
		return &expiration.DropError{Reason: expiration.RoomGone, Cause: cause}
	}
	return cause
}

// Confirm implements expiration.Roomserver. The roomserver stores an event first, and sends it later: one that it was busy
// with when the process died is known to it, even the current state perhaps, and nobody has been told. JetStream brings it
// again, but only after minutes. To give it to the roomserver once more is harmless if it was done with it, and finishes it
// if not.
func (c *Closer) Confirm(ctx context.Context, e expiration.Event) error {
	if err := c.checkSender(ctx, e); err != nil {
		return err
	}
	original, err := c.event(ctx, e.RoomID, e.ID)
	switch {
	case err != nil:
		return err
	case original == nil:
		return expiration.ErrUnknownEvent
	case !isRunning(original): // redacted, so it was sent
		return nil
	}
	return c.input(ctx, e, original)
}

// Resubmit implements expiration.Roomserver.
func (c *Closer) Resubmit(ctx context.Context, e expiration.Event, signed expiration.SignedEvent) error {
	// Of a state event only the current one counts: if another has come since, the closing event is void.
	if s, ok := e.State(); ok {
		current, err := c.CurrentState(ctx, s)
		switch {
		case err != nil:
			return c.checkRoom(ctx, e, err)
		case current == signed.EventID:
		case current != e.ID:
			return &expiration.DropError{Reason: expiration.Replaced}
		}
	}
	if err := c.checkSender(ctx, e); err != nil {
		return err
	}
	version, err := gomatrixserverlib.GetRoomVersion(gomatrixserverlib.RoomVersion(signed.RoomVersion))
	if err != nil {
		return err
	}
	pdu, err := version.NewEventFromTrustedJSON(signed.PDU, false)
	if err != nil {
		return fmt.Errorf("reading %s, which was built earlier: %w", signed.EventID, err)
	}
	return c.input(ctx, e, pdu)
}

// input gives an event of this server to the roomserver, for the first time or again.
func (c *Closer) input(ctx context.Context, e expiration.Event, pdu gomatrixserverlib.PDU) error {
	sender, err := spec.NewUserID(e.Sender, true)
	if err != nil {
		return err
	}
	return api.SendEvents(
		ctx, c.rsAPI, api.KindNew, []*types.HeaderedEvent{{PDU: pdu}},
		sender.Domain(), sender.Domain(), sender.Domain(), nil, false,
	)
}

// CurrentState implements expiration.Roomserver.
func (c *Closer) CurrentState(ctx context.Context, s expiration.StateKey) (string, error) {
	tuple := gomatrixserverlib.StateKeyTuple{EventType: s.Type, StateKey: s.Key}
	var res api.QueryCurrentStateResponse
	if err := c.rsAPI.QueryCurrentState(ctx, &api.QueryCurrentStateRequest{
		RoomID: s.RoomID, StateTuples: []gomatrixserverlib.StateKeyTuple{tuple},
	}, &res); err != nil {
		return "", fmt.Errorf("looking up the current state: %w", err)
	}
	if e := res.StateEvents[tuple]; e != nil {
		return e.EventID(), nil
	}
	return "", nil
}

// original returns the event that is to be closed, or an *expiration.DropError if it was redacted or is no longer the current
// state.
func (c *Closer) original(ctx context.Context, e expiration.Event) (gomatrixserverlib.PDU, error) {
	original, err := c.event(ctx, e.RoomID, e.ID)
	switch {
	case err != nil:
		return nil, err
	case original == nil:
		return nil, expiration.ErrUnknownEvent
	case !isRunning(original):
		return nil, &expiration.DropError{Reason: expiration.Redacted}
	}
	s, ok := e.State()
	if !ok {
		return original, nil
	}
	current, err := c.CurrentState(ctx, s)
	if err == nil && current != e.ID {
		err = &expiration.DropError{Reason: expiration.Replaced}
	}
	return original, err
}

// checkSender returns a *expiration.DropError if the room is gone or the sender is not joined.
func (c *Closer) checkSender(ctx context.Context, e expiration.Event) error {
	sender, err := spec.NewUserID(e.Sender, true)
	if err != nil {
		return err
	}
	var res api.QueryMembershipForUserResponse
	if err = c.rsAPI.QueryMembershipForUser(ctx, &api.QueryMembershipForUserRequest{
		RoomID: e.RoomID, UserID: *sender,
	}, &res); err != nil {
		return fmt.Errorf("looking up the membership of the sender: %w", err)
	}
	switch {
	case !res.RoomExists:
		return &expiration.DropError{Reason: expiration.RoomGone}
	case !res.IsInRoom:
		return &expiration.DropError{Reason: expiration.SenderGone}
	}
	return nil
}

// checkRoom returns a *expiration.DropError if a look-up failed because the room is gone, and else its error.
func (c *Closer) checkRoom(ctx context.Context, e expiration.Event, lookup error) error {
	if err := c.checkSender(ctx, e); err != nil {
		return err
	}
	return lookup
}

// event returns an event that the roomserver has, or nil.
func (c *Closer) event(ctx context.Context, roomID, eventID string) (gomatrixserverlib.PDU, error) {
	var res api.QueryEventsByIDResponse
	if err := c.rsAPI.QueryEventsByID(ctx, &api.QueryEventsByIDRequest{
		RoomID: roomID, EventIDs: []string{eventID},
	}, &res); err != nil {
		return nil, fmt.Errorf("looking up %s: %w", eventID, err)
	}
	if len(res.Events) == 0 {
		return nil, nil
	}
	return res.Events[0].PDU, nil
}
