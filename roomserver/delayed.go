package roomserver

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Send implements expiration.Roomserver. The event is sent the way a client's is: whether its sender may send it is found out
// here, and not when it is scheduled.
func (c *Closer) Send(
	ctx context.Context, t expiration.Timer, claim func(context.Context, expiration.Built) error,
) (string, error) {
	hook := &expiration.Hook{Before: claim}
	e, content := t.Event, t.Delayed.Content
	if t.Delayed.Expires > 0 {
		var err error
		if content, err = runningContent(content); err != nil {
			return "", err
		}
		// That the room has such state already does not keep it from running anew.
		ctx, _ = withGround(ctx, e)
	}
	res, err := c.sendEvent(ctx, hook, e, content, t.Delayed.Timestamp)
	if err != nil {
		return "", err
	}
	body, err := json.Marshal(res.JSON)
	switch {
	case hook.Err != nil:
		return "", hook.Err
	case err != nil:
		return "", err
	case res.Code == http.StatusOK:
		return gjson.GetBytes(body, "event_id").Str, nil
	case !hook.Called && refused(res, body):
		return "", &expiration.RefusedError{Code: res.Code, Response: body}
	}
	return "", c.checkRoom(ctx, e, fmt.Errorf("sending a delayed event: HTTP %d: %s", res.Code, body))
}

// refused reports whether an answer of Dendrite's means that an event will never be accepted. It calls a room unsupported
// whose version it fails to look up.
func refused(res util.JSONResponse, body []byte) bool {
	return res.Code >= 400 && res.Code < 500 && res.Code != http.StatusTooManyRequests &&
		gjson.GetBytes(body, "errcode").Str != string(spec.ErrorUnsupportedRoomVersion)
}

// overtaken reports whether somebody else has set the state that a delayed event is to set, since it was scheduled.
func (c *Closer) overtaken(ctx context.Context, t expiration.Timer) (bool, error) {
	current, err := c.current(ctx, t.Event)
	if err != nil || current == nil || current.EventID() == t.Delayed.Over {
		return false, err
	}
	sender, err := c.rsAPI.QueryUserIDForSender(ctx, current.RoomID(), current.SenderID())
	if err != nil {
		return false, fmt.Errorf("looking up who set the current state: %w", err)
	}
	return sender != nil && sender.String() != t.Event.Sender, nil
}
