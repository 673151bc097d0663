// Package roomserver connects the engine to Dendrite's roomserver. It has a wrapper that sees each event before it is sent, and the sender
// of closing and delayed events.
//
// All of Dendrite's components get the wrapper in place of the roomserver. When a local send of a state event returns, the token of the
// replaced event is invalid. Events that the roomserver sends by itself (invites, leaves, kicks) do not pass through the wrapper. They
// arrive over the output stream, see package syncapi.
package roomserver

import (
	"context"

	fsapi "github.com/matrix-org/dendrite/federationapi/api"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/keylock"
)

// StateWatcher is notified of local state events: by StateComes before the roomserver gets the event, and by StateSent when the event has
// been sent.
type StateWatcher interface {
	StateComes(ctx context.Context, s expiration.StateKey, eventID string) error
	StateSent(s expiration.StateKey, eventID string)
}

// API wraps Dendrite's roomserver.
type API struct {
	api.RoomserverInternalAPI
	watcher StateWatcher
	senders *keylock.Locks[sender]

	federation fsapi.RoomserverFederationAPI // see SetFederationAPI
}

// sender is a user in a room.
type sender struct{ roomID, userID string }

// LockSender locks the sends of one user in one room, and returns the function that unlocks. Dendrite's SendEvent has a lock of its own for
// that, which ignores the context. A caller that holds LockSender's lock never waits for Dendrite's.
func (a *API) LockSender(ctx context.Context, roomID, userID string) (unlock func(), err error) {
	return a.senders.Lock(ctx, sender{roomID, userID})
}

// NewAPI returns a wrapper. Watch must be called before events are sent.
func NewAPI(inner api.RoomserverInternalAPI) *API {
	return &API{RoomserverInternalAPI: inner, senders: keylock.New[sender]()}
}

// Watch sets the watcher of state events. The watcher needs the wrapper itself, so it cannot come with NewAPI.
func (a *API) Watch(w StateWatcher) { a.watcher = w }

// SetFederationAPI implements api.RoomserverInternalAPI.
func (a *API) SetFederationAPI(fsAPI fsapi.RoomserverFederationAPI, keyRing *gomatrixserverlib.KeyRing) {
	a.federation = fsAPI
	a.RoomserverInternalAPI.SetFederationAPI(fsAPI, keyRing)
}

// Federation returns the argument of SetFederationAPI, which Dendrite calls before it serves HTTP.
func (a *API) Federation() fsapi.RoomserverFederationAPI { return a.federation }

// InputRoomEvents implements api.InputRoomEventsAPI.
func (a *API) InputRoomEvents(ctx context.Context, req *api.InputRoomEventsRequest, res *api.InputRoomEventsResponse) {
	admitted, err := dendritefix.Admit(req.InputRoomEvents)
	if err != nil {
		if len(admitted) == 0 {
			res.ErrMsg = err.Error()
			return
		}
		others := *req // for example the rest of the state that a join brings
		others.InputRoomEvents, req = admitted, &others
	}
	if !req.Asynchronous {
		eachState(req, func(s expiration.StateKey, eventID string) {
			if err := a.watcher.StateComes(ctx, s, eventID); err != nil { // the output stream reports the same change
				logrus.WithError(err).WithField("event_id", eventID).Warn("Failed to note that events may be replaced")
			}
		})
	}
	if err = failpoint.Fail(failpoint.BeforeInput); err != nil {
		res.ErrMsg = err.Error()
		return
	}
	a.RoomserverInternalAPI.InputRoomEvents(ctx, req, res)
	failpoint.Pass(failpoint.AfterInput)
	if !req.Asynchronous && res.ErrMsg == "" {
		eachState(req, a.watcher.StateSent)
	}
}

// eachState calls f for each new state event in a request.
func eachState(req *api.InputRoomEventsRequest, f func(s expiration.StateKey, eventID string)) {
	for _, input := range req.InputRoomEvents {
		if key := input.Event.StateKey(); key != nil && input.Kind == api.KindNew {
			f(expiration.StateKey{RoomID: input.Event.RoomID().String(), Type: input.Event.Type(), Key: *key}, input.Event.EventID())
		}
	}
}

func built(e *types.HeaderedEvent) expiration.Built {
	return expiration.Built{
		EventID: e.EventID(), RoomID: e.RoomID().String(), Type: e.Type(), StateKey: e.StateKey(),
		RoomVersion: string(e.Version()), PDU: e.JSON(), Closable: closable(e.PDU),
	}
}
