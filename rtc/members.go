package rtc

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/tidwall/gjson"
)

// RoomserverAPI is the part of the roomserver that calls need.
type RoomserverAPI interface {
	QueryServerJoinedToRoom(ctx context.Context, req *api.QueryServerJoinedToRoomRequest, res *api.QueryServerJoinedToRoomResponse) error
	QueryServerBannedFromRoom(ctx context.Context, req *api.QueryServerBannedFromRoomRequest, res *api.QueryServerBannedFromRoomResponse) error
	QueryMembershipForUser(ctx context.Context, req *api.QueryMembershipForUserRequest, res *api.QueryMembershipForUserResponse) error
	QueryCurrentState(ctx context.Context, req *api.QueryCurrentStateRequest, res *api.QueryCurrentStateResponse) error
	QueryUserIDForSender(ctx context.Context, roomID spec.RoomID, senderID spec.SenderID) (*spec.UserID, error)
}

// Rooms tells who is in a room, and who publishes to an SFU there.
type Rooms struct {
	rsAPI   RoomserverAPI
	isLocal func(spec.ServerName) bool
}

// NewRooms returns the rooms of a roomserver. isLocal reports whether a name is one of this server's.
func NewRooms(rsAPI RoomserverAPI, isLocal func(spec.ServerName) bool) Rooms {
	return Rooms{rsAPI, isLocal}
}

// Joined reports whether a user, of any server, is joined to a room. In a room that this server is not in, nobody counts as joined, because
// no server tells this one any more who leaves. Another server that the room's ACL bans has no joined users.
func (r Rooms) Joined(ctx context.Context, roomID, userID string) (bool, error) {
	user, err := spec.NewUserID(userID, true)
	if err != nil {
		return false, nil
	}
	if joined, err := r.ServerJoined(ctx, roomID, ""); err != nil || !joined {
		return false, err
	}
	var res api.QueryMembershipForUserResponse
	err = r.rsAPI.QueryMembershipForUser(ctx, &api.QueryMembershipForUserRequest{RoomID: roomID, UserID: *user}, &res)
	if err != nil {
		return false, fmt.Errorf("looking up a membership: %w", err)
	}
	if !res.IsInRoom || r.isLocal(user.Domain()) {
		return res.IsInRoom, nil
	}
	var acl api.QueryServerBannedFromRoomResponse
	err = r.rsAPI.QueryServerBannedFromRoom(ctx, &api.QueryServerBannedFromRoomRequest{RoomID: roomID, ServerName: user.Domain()}, &acl)
	if err != nil {
		return false, fmt.Errorf("looking up the server ACL: %w", err)
	}
	return !acl.Banned, nil
}

// ServerJoined reports whether a server has joined users in a room. The name "" is this server.
func (r Rooms) ServerJoined(ctx context.Context, roomID string, server spec.ServerName) (bool, error) {
	if _, err := spec.NewRoomID(roomID); err != nil {
		return false, nil
	}
	if _, _, ok := spec.ParseAndValidateServerName(server); !ok && server != "" {
		return false, nil
	}
	var res api.QueryServerJoinedToRoomResponse
	err := r.rsAPI.QueryServerJoinedToRoom(ctx, &api.QueryServerJoinedToRoomRequest{RoomID: roomID, ServerName: server}, &res)
	if err != nil {
		return false, fmt.Errorf("looking up whether a server is in a room: %w", err)
	}
	return res.IsInRoom, nil
}

// memberEvents are the state events, stable and unstable, with which a member of a call says where its media are. The fields transportFields
// have the list of transports.
var (
	memberEvents    = []string{"org.matrix.msc3401.call.member", "m.call.member", "org.matrix.msc4143.rtc.member", "m.rtc.member"}
	transportFields = []string{"foci_preferred", "rtc_transports"}
)

// Publishers returns the servers of the members of a room's calls who publish to the SFU with this URL, the longest standing first.
func (r Rooms) Publishers(ctx context.Context, roomID, url string) (servers []spec.ServerName, err error) {
	id, err := spec.NewRoomID(roomID)
	if err != nil {
		return nil, nil
	}
	req := &api.QueryCurrentStateRequest{RoomID: roomID, AllowWildcards: true}
	for _, eventType := range memberEvents {
		req.StateTuples = append(req.StateTuples, gomatrixserverlib.StateKeyTuple{EventType: eventType, StateKey: "*"})
	}
	var res api.QueryCurrentStateResponse
	if err = r.rsAPI.QueryCurrentState(ctx, req, &res); err != nil {
		return nil, fmt.Errorf("reading the members of a call: %w", err)
	}
	var members []*types.HeaderedEvent
	for _, event := range res.StateEvents {
		if publishes(event.Content(), url) {
			members = append(members, event)
		}
	}
	slices.SortFunc(members, func(a, b *types.HeaderedEvent) int { return cmp.Compare(a.OriginServerTS(), b.OriginServerTS()) })
	for _, event := range members {
		user, err := r.rsAPI.QueryUserIDForSender(ctx, *id, event.SenderID())
		if err == nil && user != nil && !slices.Contains(servers, user.Domain()) {
			servers = append(servers, user.Domain())
		}
	}
	return servers, nil
}

// publishes reports whether a membership with this content publishes to an SFU.
func publishes(content []byte, url string) bool {
	for _, field := range transportFields {
		for _, transport := range gjson.GetBytes(content, field).Array() {
			if trimmed(transport.Get("url").Str) == url {
				return true
			}
		}
	}
	return false
}

// trimmed returns a URL in the form in which URLs are compared.
func trimmed(url string) string { return strings.TrimSuffix(url, "/") }
