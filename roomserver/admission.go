package roomserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	fsapi "github.com/matrix-org/dendrite/federationapi/api"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/sirupsen/logrus"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/jsondepth"
)

// Events of other servers that would stop this one are let in by neither of the two ways on which events come: as input, and fetched by
// the roomserver because another event refers to them. A room in which such an event was sent has a gap here, and goes on.

var (
	// errTooDeep: Dendrite wraps an event in more JSON at each stage, and reads none that is nested more deeply than 10,000 levels. The
	// event would break the /sync of everybody in the room.
	errTooDeep = fmt.Errorf("the event is nested more deeply than %d levels", jsondepth.Max)
	// errUnstorable: PostgreSQL would keep Dendrite's sync API busy with the event for ever.
	errUnstorable = errors.New("the event relates to, or redacts, something whose name has a NUL character")
)

// admit returns why an event is not let in, or nil.
func admit(event []byte) error {
	switch {
	case len(event) > 0 && jsondepth.TooDeep(event[1:]): // within the event
		return errTooDeep
	case bytes.Contains(event, []byte(`\u0000`)) &&
		(dendritefix.Unstorable(event) || dendritefix.Unstorable([]byte(gjson.GetBytes(event, "content").Raw))):
		return errUnstorable
	}
	return nil
}

// admitAll returns the events that are let in, and why another one is not.
func admitAll(inputs []api.InputRoomEvent) (admitted []api.InputRoomEvent, refused error) {
	at := slices.IndexFunc(inputs, func(input api.InputRoomEvent) bool { return admit(input.Event.JSON()) != nil })
	if at < 0 {
		return inputs, nil
	}
	for _, input := range inputs {
		if err := admit(input.Event.JSON()); err != nil {
			refused = err
			logRefused(input.Event.EventID(), err)
		} else {
			admitted = append(admitted, input)
		}
	}
	return admitted, refused
}

func logRefused(event string, err error) {
	logrus.WithError(err).WithFields(logrus.Fields{"component": "expiration", "event_id": event}).Warn("Refused an event")
}

// fetches is the federation API that the roomserver fetches events with. What is not let in is not in the answers.
type fetches struct {
	fsapi.RoomserverFederationAPI
	// redacts is called when a redaction comes, with its room's ID.
	redacts func(roomID string)
}

// keep returns those of some events that are let in.
func keep[E ~[]byte](f *fetches, roomID string, events []E) []E {
	return slices.DeleteFunc(events, func(event E) bool {
		if gjson.GetBytes(event, "type").Str == spec.MRoomRedaction {
			f.redacts(roomID)
		}
		err := admit(event)
		if err != nil {
			logRefused("", err)
		}
		return err != nil
	})
}

func (f *fetches) LookupMissingEvents(
	ctx context.Context, origin, server spec.ServerName, roomID string, missing fclient.MissingEvents, version gomatrixserverlib.RoomVersion,
) (fclient.RespMissingEvents, error) {
	res, err := f.RoomserverFederationAPI.LookupMissingEvents(ctx, origin, server, roomID, missing, version)
	res.Events = keep(f, roomID, res.Events)
	return res, err
}

func (f *fetches) GetEventAuth(
	ctx context.Context, origin, server spec.ServerName, version gomatrixserverlib.RoomVersion, roomID, eventID string,
) (fclient.RespEventAuth, error) {
	res, err := f.RoomserverFederationAPI.GetEventAuth(ctx, origin, server, version, roomID, eventID)
	res.AuthEvents = keep(f, roomID, res.AuthEvents)
	return res, err
}

func (f *fetches) GetEvent(ctx context.Context, origin, server spec.ServerName, eventID string) (gomatrixserverlib.Transaction, error) {
	res, err := f.RoomserverFederationAPI.GetEvent(ctx, origin, server, eventID)
	res.PDUs = keepOfRooms(f, res.PDUs)
	return res, err
}

func (f *fetches) Backfill(
	ctx context.Context, origin, server spec.ServerName, roomID string, limit int, from []string,
) (gomatrixserverlib.Transaction, error) {
	res, err := f.RoomserverFederationAPI.Backfill(ctx, origin, server, roomID, limit, from)
	res.PDUs = keep(f, roomID, res.PDUs)
	return res, err
}

// keepOfRooms is keep for events that say themselves of which room they are.
func keepOfRooms[E ~[]byte](f *fetches, events []E) (kept []E) {
	for _, event := range events {
		kept = append(kept, keep(f, gjson.GetBytes(event, "room_id").Str, []E{event})...)
	}
	return kept
}

func (f *fetches) LookupState(
	ctx context.Context, origin, server spec.ServerName, roomID, eventID string, version gomatrixserverlib.RoomVersion,
) (gomatrixserverlib.StateResponse, error) {
	res, err := f.RoomserverFederationAPI.LookupState(ctx, origin, server, roomID, eventID, version)
	if err != nil {
		return res, err
	}
	return &fclient.RespState{AuthEvents: keep(f, roomID, res.GetAuthEvents()), StateEvents: keep(f, roomID, res.GetStateEvents())}, nil
}
