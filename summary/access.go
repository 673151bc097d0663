package summary

import (
	"context"
	"slices"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/tidwall/gjson"
)

// access is the information that decides whether a requester may know of a room.
type access struct {
	// known is whether the room exists: this server is in it, or another server has answered for it.
	known bool
	// who is nil for a request without a login. The membership is the user's, and leave if the user never had one.
	who        *whoAsks
	membership string
	// joinRule is what the room's rule means in the room's version, see meaning.
	joinRule      string
	worldReadable bool
	// allowedRooms are the rooms whose members may join a restricted room. joinedRooms are the rooms that the user is in.
	allowedRooms []string
	joinedRooms  []spec.RoomID
}

// access looks up who may know of a room. It makes the same queries for a room that does not exist as for a private room. So a requester
// cannot tell the two apart by the time that the answer takes.
func (s *Summaries) access(ctx context.Context, who *whoAsks, id spec.RoomID) (a access, err error) {
	roomID := id.String()
	var server api.QueryServerJoinedToRoomResponse
	err = s.rsAPI.QueryServerJoinedToRoom(ctx, &api.QueryServerJoinedToRoomRequest{RoomID: roomID}, &server)
	if err != nil {
		return access{}, err
	}
	rule, visibility := gomatrixserverlib.StateKeyTuple{EventType: spec.MRoomJoinRules},
		gomatrixserverlib.StateKeyTuple{EventType: spec.MRoomHistoryVisibility}
	tuples := []gomatrixserverlib.StateKeyTuple{rule, visibility}
	member := gomatrixserverlib.StateKeyTuple{EventType: spec.MRoomMember}
	if who != nil {
		sender, err := s.rsAPI.QuerySenderIDForUser(ctx, id, who.userID)
		if err != nil {
			return access{}, err
		}
		if sender != nil {
			member.StateKey = string(*sender)
		}
		tuples = append(tuples, member)
		if a.joinedRooms, err = s.rsAPI.QueryRoomsForUser(ctx, who.userID, spec.Join); err != nil {
			return access{}, err
		}
	}
	var state api.QueryBulkStateContentResponse
	err = s.rsAPI.QueryBulkStateContent(ctx, &api.QueryBulkStateContentRequest{RoomIDs: []string{roomID}, StateTuples: tuples}, &state)
	if err != nil {
		return access{}, err
	}
	content := state.Rooms[roomID]
	a.known, a.who = server.IsInRoom, who
	a.joinRule = meaning(content[rule], server.RoomVersion)
	a.worldReadable = content[visibility] == string(gomatrixserverlib.HistoryVisibilityWorldReadable)
	if a.membership = content[member]; a.membership == "" {
		a.membership = spec.Leave
	}
	if !a.known || a.allows() || a.joinRule != spec.Restricted || who == nil {
		return a, nil
	}
	events, err := s.state(ctx, roomID, spec.MRoomJoinRules)
	a.allowedRooms = allowedRooms(events[spec.MRoomJoinRules])
	return a, err
}

// allows reports whether the requester may know of the room. That is so if anybody can read it, join it or knock at it, or if the requester
// is in it, is invited, has knocked, or may join it.
func (a *access) allows() bool {
	if !a.known {
		return false
	}
	switch a.joinRule {
	case spec.Public, spec.Knock, spec.KnockRestricted:
		return true
	}
	switch {
	case a.worldReadable:
		return true
	case a.who == nil:
		return false
	}
	switch a.membership {
	case spec.Join, spec.Invite, spec.Knock:
		return true
	case spec.Ban:
		return false
	}
	return a.joinRule == spec.Restricted && slices.ContainsFunc(a.joinedRooms, func(id spec.RoomID) bool {
		return slices.Contains(a.allowedRooms, id.String())
	})
}

// Room versions by their join rules, which gomatrixserverlib does not tell: versions without knocking, and versions with the rule
// knock_restricted (MSC3787).
var (
	withoutKnocking = []gomatrixserverlib.RoomVersion{
		gomatrixserverlib.RoomVersionV1, gomatrixserverlib.RoomVersionV2, gomatrixserverlib.RoomVersionV3,
		gomatrixserverlib.RoomVersionV4, gomatrixserverlib.RoomVersionV5, gomatrixserverlib.RoomVersionV6,
	}
	withKnockRestricted = []gomatrixserverlib.RoomVersion{
		gomatrixserverlib.RoomVersionV10, gomatrixserverlib.RoomVersionV11, gomatrixserverlib.RoomVersionPseudoIDs, "org.matrix.msc3787",
	}
)

// meaning returns what a join rule means in a room version. A rule that the version does not have means invite.
func meaning(joinRule string, version gomatrixserverlib.RoomVersion) string {
	has := true
	switch joinRule {
	case spec.Knock:
		has = !slices.Contains(withoutKnocking, version)
	case spec.KnockRestricted:
		has = slices.Contains(withKnockRestricted, version)
	case spec.Restricted:
		impl, err := gomatrixserverlib.GetRoomVersion(version)
		has = err == nil && impl.CheckRestrictedJoinsAllowed() == nil
	}
	if !has {
		return spec.Invite
	}
	return joinRule
}

func isRestricted(joinRule string) bool {
	return joinRule == spec.Restricted || joinRule == spec.KnockRestricted
}

// allowedRooms returns the rooms whose members may join, as the m.room.join_rules event says. The event may be nil.
func allowedRooms(joinRules *types.HeaderedEvent) (roomIDs []string) {
	if joinRules == nil {
		return nil
	}
	for _, allow := range gjson.GetBytes(joinRules.Content(), "allow").Array() {
		if allow.Get("type").Str == spec.MRoomMembership {
			roomIDs = append(roomIDs, allow.Get("room_id").Str)
		}
	}
	return roomIDs
}
