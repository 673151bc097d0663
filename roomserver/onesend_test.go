package roomserver

import (
	"errors"
	"testing"

	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// verdict distinguishes a fault of the roomserver, Dendrite's answer about the event, and a send that the hook called off.
func TestVerdict(t *testing.T) {
	fault, off := errors.New("disk full"), errors.New("the timer was refreshed")
	refused, unsendable := new(*expiration.RefusedError), new(*expiration.UnsendableError)
	for name, test := range map[string]struct {
		send oneSend
		off  error
		code int
		is   error // or
		as   any
	}{
		"bad content":            {code: 400, as: refused},
		"forbidden":              {code: 403, as: refused},
		"no such room":           {code: 404, as: refused},
		"too large":              {code: 413, as: refused},
		"no verdict":             {code: 500, as: unsendable},
		"rejected by the room":   {send: oneSend{rejected: true}, code: 500, as: unsendable},
		"fault":                  {send: oneSend{fault: fault}, code: 500, is: fault},
		"fault that looks final": {send: oneSend{fault: fault}, code: 400, is: fault},
		"called off":             {off: off, code: 500, is: off},
	} {
		t.Run(name, func(t *testing.T) {
			test.send.hook = &expiration.Hook{Err: test.off}
			err := test.send.verdict(util.JSONResponse{Code: test.code, JSON: spec.Unknown("")})
			if test.is != nil {
				require.Equal(t, test.is, err)
			} else {
				require.ErrorAs(t, err, test.as)
			}
		})
	}
	limited := oneSend{hook: &expiration.Hook{}}
	err := limited.verdict(util.JSONResponse{Code: 429})
	require.False(t, errors.As(err, refused) || errors.As(err, unsendable), "a limit passes")
}

// An event that the roomserver cannot decode is rejected for good. A fault of the database is not.
func TestRejected(t *testing.T) {
	for text, want := range map[string]bool{
		"":                          false,
		"pq: could not write block": false,
		"database is locked":        false,
		"context deadline exceeded": false,
		"eventauth: not allowed":    true,
		"membership: json: cannot unmarshal number into Go struct field MemberContent.displayname of type string": true,
		"illegal base64 data at input byte 4": true,
	} {
		require.Equal(t, want, rejected(&api.InputRoomEventsResponse{ErrMsg: text}), text)
	}
}
