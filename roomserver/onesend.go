package roomserver

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// oneSend decorates the roomserver for one call of Dendrite's SendEvent. SendEvent takes the roomserver as a parameter and uses it to
// query, build and send. So the decorator sees and decides everything, and no value travels in a context. SendEvent starts no goroutines,
// so there is no lock.
type oneSend struct {
	api.ClientRoomserverAPI
	hook *expiration.Hook
	// ground is nil if the prev events and the state do not matter.
	ground *ground
	// fault is the first error of the roomserver or its database. Without one, the answer of SendEvent is a verdict about the
	// event: the same event gets the same answer again.
	fault error
	// rejected: the roomserver has the event, and the auth rules do not allow it.
	rejected bool
}

// Hooked returns the request and the roomserver for one call of Dendrite's SendEvent, which calls the hook. If the hook calls the
// send off, Dendrite logs an error; the request's logger turns it into debug output.
func (a *API) Hooked(req *http.Request, hook *expiration.Hook) (*http.Request, api.ClientRoomserverAPI) {
	s := &oneSend{ClientRoomserverAPI: a, hook: hook}
	return s.quiet(req), s
}

// InputRoomEvents implements api.InputRoomEventsAPI. The roomserver does not get the event if the hook's Before fails.
func (s *oneSend) InputRoomEvents(ctx context.Context, req *api.InputRoomEventsRequest, res *api.InputRoomEventsResponse) {
	s.hook.Called = true
	if s.hook.Err = s.hook.Before(ctx, built(req.InputRoomEvents[0].Event)); s.hook.Err != nil {
		res.ErrMsg = s.hook.Err.Error()
		return
	}
	if s.hook.After != nil {
		defer func() { s.hook.After(ctx, res.ErrMsg == "") }()
	}
	s.ClientRoomserverAPI.InputRoomEvents(ctx, req, res)
	if s.rejected = rejected(res); !s.rejected {
		s.note(res.Err())
	}
}

// rejected reports whether the auth rules do not allow an event, the wrapper refused it, or the roomserver cannot decode it. The roomserver's
// answer is only a text, and that alone distinguishes a rejection from a fault of the database.
func rejected(res *api.InputRoomEventsResponse) bool {
	return dendritefix.Refused(res.ErrMsg) || strings.HasPrefix(res.ErrMsg, (&gomatrixserverlib.NotAllowed{}).Error()) ||
		slices.ContainsFunc(undecodable, func(text string) bool { return strings.Contains(res.ErrMsg, text) })
}

// undecodable are texts in the errors of Go's decoders.
var undecodable = []string{"json: cannot unmarshal", "illegal base64 data"}

// verdict returns the error that an unsuccessful answer of SendEvent means:
//
//   - the hook's error, if the hook called the send off
//   - the fault of the roomserver, if there was one
//   - a *expiration.RefusedError, which a client may be told
//   - a *expiration.UnsendableError, if Dendrite cannot handle the event
//   - another error, if a rate limit was reached
func (s *oneSend) verdict(res util.JSONResponse) error {
	body, err := json.Marshal(res.JSON)
	if err != nil {
		return err
	}
	failed := fmt.Errorf("the answer to a send: HTTP %d: %s", res.Code, body)
	switch {
	case s.hook.Err != nil:
		return s.hook.Err
	case s.fault != nil:
		return s.fault
	case s.rejected:
		return &expiration.UnsendableError{Cause: failed}
	case res.Code >= 400 && res.Code < 500 && res.Code != http.StatusTooManyRequests:
		return &expiration.RefusedError{Code: res.Code, Response: body}
	case res.Code == http.StatusTooManyRequests:
		return failed
	}
	return &expiration.UnsendableError{Cause: failed}
}

// note remembers the first error.
func (s *oneSend) note(err error) {
	if s.fault == nil {
		s.fault = err
	}
}

// noted is note for a query that also returns a result.
func noted[T any](s *oneSend, result T, err error) (T, error) {
	s.note(err)
	return result, err
}

// These are the other methods that SendEvent calls, in all supported lines of Dendrite. The error of a method without a wrapper
// would be taken for a verdict.

func (s *oneSend) QueryRoomVersionForRoom(ctx context.Context, roomID string) (gomatrixserverlib.RoomVersion, error) {
	version, err := s.ClientRoomserverAPI.QueryRoomVersionForRoom(ctx, roomID)
	return noted(s, version, err)
}

func (s *oneSend) QuerySenderIDForUser(ctx context.Context, roomID spec.RoomID, userID spec.UserID) (*spec.SenderID, error) {
	senderID, err := s.ClientRoomserverAPI.QuerySenderIDForUser(ctx, roomID, userID)
	return noted(s, senderID, err)
}

func (s *oneSend) QueryUserIDForSender(ctx context.Context, roomID spec.RoomID, senderID spec.SenderID) (*spec.UserID, error) {
	userID, err := s.ClientRoomserverAPI.QueryUserIDForSender(ctx, roomID, senderID)
	return noted(s, userID, err)
}

func (s *oneSend) SigningIdentityFor(ctx context.Context, roomID spec.RoomID, userID spec.UserID) (fclient.SigningIdentity, error) {
	identity, err := s.ClientRoomserverAPI.SigningIdentityFor(ctx, roomID, userID)
	return noted(s, identity, err)
}

func (s *oneSend) GetAliasesForRoomID(
	ctx context.Context, req *api.GetAliasesForRoomIDRequest, res *api.GetAliasesForRoomIDResponse,
) error {
	err := s.ClientRoomserverAPI.GetAliasesForRoomID(ctx, req, res)
	s.note(err)
	return err
}
