package roomserver

import (
	"context"

	fsapi "github.com/matrix-org/dendrite/federationapi/api"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
)

// Dendrite's federation component starts to read its streams when it is made, and is then given to the roomserver, which
// cannot answer a query before that. What is in the streams after a crash comes at once: the process would end at its start
// with a nil pointer. The queries that those consumers make wait here for that moment.

// SetFederationAPI implements api.RoomserverInternalAPI.
func (a *API) SetFederationAPI(fsAPI fsapi.RoomserverFederationAPI, keyRing *gomatrixserverlib.KeyRing) {
	a.RoomserverInternalAPI.SetFederationAPI(fsAPI, keyRing)
	a.federation = fsAPI
	close(a.ready)
}

// Federation returns what SetFederationAPI was given. HTTP is served only after that.
func (a *API) Federation() fsapi.RoomserverFederationAPI { return a.federation }

// wait returns when the roomserver can answer queries.
func (a *API) wait(ctx context.Context) error {
	select {
	case <-a.ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// QueryEventsByID implements api.RoomserverInternalAPI.
func (a *API) QueryEventsByID(ctx context.Context, req *api.QueryEventsByIDRequest, res *api.QueryEventsByIDResponse) error {
	if err := a.wait(ctx); err != nil {
		return err
	}
	return a.RoomserverInternalAPI.QueryEventsByID(ctx, req, res)
}

// QueryMembershipsForRoom implements api.RoomserverInternalAPI.
func (a *API) QueryMembershipsForRoom(
	ctx context.Context, req *api.QueryMembershipsForRoomRequest, res *api.QueryMembershipsForRoomResponse,
) error {
	if err := a.wait(ctx); err != nil {
		return err
	}
	return a.RoomserverInternalAPI.QueryMembershipsForRoom(ctx, req, res)
}

// QueryRoomsForUser implements api.RoomserverInternalAPI.
func (a *API) QueryRoomsForUser(ctx context.Context, userID spec.UserID, membership string) ([]spec.RoomID, error) {
	if err := a.wait(ctx); err != nil {
		return nil, err
	}
	return a.RoomserverInternalAPI.QueryRoomsForUser(ctx, userID, membership)
}

// QueryUserIDForSender implements api.RoomserverInternalAPI.
func (a *API) QueryUserIDForSender(ctx context.Context, roomID spec.RoomID, senderID spec.SenderID) (*spec.UserID, error) {
	if err := a.wait(ctx); err != nil {
		return nil, err
	}
	return a.RoomserverInternalAPI.QueryUserIDForSender(ctx, roomID, senderID)
}
