package dendritefix

import (
	"context"

	fsapi "github.com/matrix-org/dendrite/federationapi/api"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
)

// Ready is a roomserver whose queries wait until it can answer them.
//
// Dendrite's federation component reads its streams as soon as it is made, and is given to the roomserver only after that. After a crash
// the streams have messages. The component then queries a roomserver that lacks its federation API, and the process ends with a nil
// pointer.
//
// This file can go when Dendrite starts its stream consumers after the roomserver has the federation API.
type Ready struct {
	api.RoomserverInternalAPI
	ready chan struct{} // closed by SetFederationAPI
}

// NewReady returns a roomserver whose queries wait for SetFederationAPI.
func NewReady(inner api.RoomserverInternalAPI) *Ready {
	return &Ready{RoomserverInternalAPI: inner, ready: make(chan struct{})}
}

// SetFederationAPI implements api.RoomserverInternalAPI.
func (r *Ready) SetFederationAPI(fsAPI fsapi.RoomserverFederationAPI, keyRing *gomatrixserverlib.KeyRing) {
	r.RoomserverInternalAPI.SetFederationAPI(fsAPI, keyRing)
	close(r.ready)
}

// wait returns as soon as the roomserver can answer queries.
func (r *Ready) wait(ctx context.Context) error {
	select {
	case <-r.ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// These are the queries that the federation component makes before it is given to the roomserver.

func (r *Ready) QueryEventsByID(ctx context.Context, req *api.QueryEventsByIDRequest, res *api.QueryEventsByIDResponse) error {
	if err := r.wait(ctx); err != nil {
		return err
	}
	return r.RoomserverInternalAPI.QueryEventsByID(ctx, req, res)
}

func (r *Ready) QueryMembershipsForRoom(
	ctx context.Context, req *api.QueryMembershipsForRoomRequest, res *api.QueryMembershipsForRoomResponse,
) error {
	if err := r.wait(ctx); err != nil {
		return err
	}
	return r.RoomserverInternalAPI.QueryMembershipsForRoom(ctx, req, res)
}

func (r *Ready) QueryRoomsForUser(ctx context.Context, userID spec.UserID, membership string) ([]spec.RoomID, error) {
	if err := r.wait(ctx); err != nil {
		return nil, err
	}
	return r.RoomserverInternalAPI.QueryRoomsForUser(ctx, userID, membership)
}

func (r *Ready) QueryUserIDForSender(ctx context.Context, roomID spec.RoomID, senderID spec.SenderID) (*spec.UserID, error) {
	if err := r.wait(ctx); err != nil {
		return nil, err
	}
	return r.RoomserverInternalAPI.QueryUserIDForSender(ctx, roomID, senderID)
}
