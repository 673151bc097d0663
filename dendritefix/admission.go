package dendritefix

import (
	"bytes"
	"cmp"
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

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/jsondepth"
)

var (
	// errEventTooDeep: Dendrite wraps an event in more JSON at each stage, and cannot read JSON with more than 10,000 levels. The event
	// would break the /sync of every user in the room.
	errEventTooDeep = fmt.Errorf("the event is nested more deeply than %d levels", jsondepth.Max)
	// errUnstorable: PostgreSQL rejects the event, and Dendrite's sync API retries it for ever.
	errUnstorable = errors.New("the event relates to, or redacts, something whose name has a NUL character")
)

// admit returns why an event is refused, or nil.
func admit(event []byte) error {
	switch {
	case len(event) > 0 && jsondepth.TooDeep(event[1:]): // without the level of the event itself
		return errEventTooDeep
	case bytes.Contains(event, []byte(`\u0000`)) &&
		(Unstorable(event) || Unstorable([]byte(gjson.GetBytes(event, "content").Raw))):
		return errUnstorable
	}
	return nil
}

// Admit returns the harmless events of a request. If it refuses others, it also returns why it refuses the last of them.
//
// Some events of other servers would stop this server: their JSON is nested too deeply, or PostgreSQL cannot store them. Events arrive in
// two ways, and both are checked. Admit checks the input of the roomserver. AdmitFetched checks the events that the roomserver fetches
// because another event refers to them. A refused event leaves a gap in the room, and the room goes on.
//
// This file can go when Dendrite refuses such events itself, or copes with them.
func Admit(inputs []api.InputRoomEvent) (admitted []api.InputRoomEvent, refused error) {
	if !slices.ContainsFunc(inputs, func(input api.InputRoomEvent) bool { return admit(input.Event.JSON()) != nil }) {
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

// Refused reports whether an error text of the roomserver says that Admit refused an event.
func Refused(errMsg string) bool {
	return errMsg == errEventTooDeep.Error() || errMsg == errUnstorable.Error()
}

func logRefused(event string, err error) {
	logrus.WithError(err).WithFields(logrus.Fields{"component": "expiration", "event_id": event}).Warn("Refused an event")
}

// fetches is the federation API with which the roomserver fetches events. It removes refused events from the answers.
type fetches struct {
	fsapi.RoomserverFederationAPI
	fetched func(roomID, eventType string)
}

// AdmitFetched returns a federation API whose answers have no events that Admit would refuse. It calls fetched for every event that another
// server sends, refused or not.
func AdmitFetched(fsAPI fsapi.RoomserverFederationAPI, fetched func(roomID, eventType string)) fsapi.RoomserverFederationAPI {
	return &fetches{fsAPI, fetched}
}

// keep returns the events that are not refused. Without a room ID, they are of the rooms that they name.
func keep[E ~[]byte](f *fetches, roomID string, events []E) []E {
	return slices.DeleteFunc(events, func(event E) bool {
		f.fetched(cmp.Or(roomID, gjson.GetBytes(event, "room_id").Str), gjson.GetBytes(event, "type").Str)
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
	res.PDUs = keep(f, "", res.PDUs)
	return res, err
}

func (f *fetches) Backfill(
	ctx context.Context, origin, server spec.ServerName, roomID string, limit int, from []string,
) (gomatrixserverlib.Transaction, error) {
	res, err := f.RoomserverFederationAPI.Backfill(ctx, origin, server, roomID, limit, from)
	res.PDUs = keep(f, roomID, res.PDUs)
	return res, err
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
