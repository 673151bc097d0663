package clientapi

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Explain finds the reason why a delayed event was not sent, even if the engine has wrapped it. It shows no internal errors.
func TestExplain(t *testing.T) {
	drop := func(reason expiration.DropReason, cause error) error {
		return &expiration.DropError{Reason: reason, Cause: cause}
	}
	refused := &expiration.RefusedError{Code: 403, Response: json.RawMessage(`{"errcode":"M_FORBIDDEN","error":"no"}`)}
	for want, err := range map[string]error{
		`{"errcode":"M_FORBIDDEN","error":"no"}`:                                                            drop(expiration.Forbidden, refused),
		`{"errcode":"M_TOO_LARGE","error":"The closing event would be too large"}`:                          drop(expiration.Forbidden, expiration.ErrTooLarge),
		`{"errcode":"M_LIMIT_EXCEEDED","error":"Too many of your events are running, or were due at once"}`: drop(expiration.Forbidden, &expiration.LimitError{}),
		`{"errcode":"M_UNKNOWN","error":"The homeserver was not able to send this event"}`:                  drop(expiration.Unsendable, errors.New("why")),
		`{"errcode":"M_NOT_FOUND","error":"The room is gone"}`:                                              drop(expiration.RoomGone, nil),
		`{"errcode":"M_FORBIDDEN","error":"The sender may no longer send this event"}`:                      drop(expiration.SenderGone, nil),
		`{"errcode":"M_UNKNOWN","error":"Internal server error"}`:                                           errors.New("a secret"),
	} {
		require.JSONEq(t, want, string(Explain(err)))
	}
	unanswered := Explain(drop(expiration.Unanswered, errors.New("a secret")))
	require.JSONEq(t, `{"errcode":"M_UNKNOWN","error":"The homeserver was not able to send this event"}`, string(unanswered))
}
