package clientapi

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/matrix-org/dendrite/roomserver/api"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

// checkJoined returns an error if a user is not in a room.
func (a *API) checkJoined(req *http.Request, device *userapi.Device, roomID string) error {
	userID, err := spec.NewUserID(device.UserID, true)
	if err != nil {
		return err
	}
	var res api.QueryMembershipForUserResponse
	err = a.rsAPI.QueryMembershipForUser(req.Context(), &api.QueryMembershipForUserRequest{RoomID: roomID, UserID: *userID}, &res)
	switch {
	case err != nil:
		return fmt.Errorf("looking up a membership: %w", err)
	case !res.RoomExists || !res.IsInRoom:
		return webapi.Refuse(http.StatusForbidden, spec.Forbidden("You are not in this room"))
	}
	return nil
}

// checkPower returns an error if a user has too little power to send an event now.
func (a *API) checkPower(ctx context.Context, device *userapi.Device, to target) error {
	switch to.eventType {
	case spec.MRoomMember, spec.MRoomThirdPartyInvite, spec.MRoomAliases: // these have rules of their own
		return nil
	}
	roomID, roomErr := spec.NewRoomID(to.roomID)
	userID, userErr := spec.NewUserID(device.UserID, true)
	if err := errors.Join(roomErr, userErr); err != nil {
		return err
	}
	tuple := gomatrixserverlib.StateKeyTuple{EventType: spec.MRoomPowerLevels}
	var res api.QueryCurrentStateResponse
	if err := a.rsAPI.QueryCurrentState(ctx, &api.QueryCurrentStateRequest{
		RoomID: to.roomID, StateTuples: []gomatrixserverlib.StateKeyTuple{tuple},
	}, &res); err != nil {
		return fmt.Errorf("looking up power levels: %w", err)
	}
	current := res.StateEvents[tuple]
	if current == nil {
		return nil
	}
	levels, err := current.PowerLevels()
	if err != nil {
		return fmt.Errorf("reading power levels: %w", err)
	}
	sender, err := a.rsAPI.QuerySenderIDForUser(ctx, *roomID, *userID)
	switch {
	case err != nil:
		return fmt.Errorf("looking up the sender: %w", err)
	case sender == nil:
		return webapi.Refuse(http.StatusForbidden, spec.Forbidden("You are not in this room"))
	}
	has, needs := levels.UserLevel(*sender), levels.EventLevel(to.eventType, to.stateKey != nil)
	if has < needs {
		return webapi.Refuse(http.StatusForbidden, spec.Forbidden(fmt.Sprintf(
			"Your power level is %d, and this event needs %d", has, needs,
		)))
	}
	return nil
}
