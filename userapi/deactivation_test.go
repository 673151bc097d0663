package userapi

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/matrix-org/dendrite/userapi/api"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"github.com/stretchr/testify/require"
)

// steps is a user API and a function that cancels. It records the calls.
type steps struct {
	api.UserInternalAPI
	t                 *testing.T
	accounts          *Accounts
	cancels, failedAt int // how often CancelAll was called, and which of these calls fails
	calls             []string
	failed            error
}

var errFault = errors.New("disk full")

func (s *steps) CancelAll(ctx context.Context, userID string) error {
	require.NoError(s.t, ctx.Err())
	s.calls = append(s.calls, "cancel "+userID)
	if s.cancels++; s.cancels == s.failedAt {
		return errFault
	}
	return nil
}

func (s *steps) PerformAccountDeactivation(
	ctx context.Context, req *api.PerformAccountDeactivationRequest, res *api.PerformAccountDeactivationResponse,
) error {
	require.NoError(s.t, ctx.Err())
	s.calls = append(s.calls, "deactivate "+req.Localpart)
	deactivated, err := s.accounts.Deactivated(ctx, "@alice:"+server)
	require.NoError(s.t, err)
	require.True(s.t, deactivated, "what is due meanwhile is not sent")
	res.AccountDeactivated = s.failed == nil
	return s.failed
}

func TestDeactivation(t *testing.T) {
	cancel, deactivate := "cancel @alice:"+server, "deactivate alice"
	for name, test := range map[string]struct {
		failedAt int
		failed   error
		want     []string
		err      error
	}{
		"all is well":              {0, nil, []string{cancel, deactivate, cancel}, nil},
		"cannot be cancelled":      {1, nil, []string{cancel}, errFault},
		"cannot be deactivated":    {0, errFault, []string{cancel, deactivate}, errFault},
		"more cannot be cancelled": {2, nil, []string{cancel, deactivate, cancel}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, accounts := open(t, "file:"+filepath.Join(t.TempDir(), "accounts.db"))
			s := &steps{t: t, accounts: accounts, failedAt: test.failedAt, failed: test.failed}
			hungUp, cancel := context.WithCancel(t.Context())
			cancel()
			logged := logtest.NewGlobal()
			defer logrus.StandardLogger().ReplaceHooks(logrus.LevelHooks{})
			var res api.PerformAccountDeactivationResponse
			err := New(s, accounts, s.CancelAll).PerformAccountDeactivation(hungUp, &api.PerformAccountDeactivationRequest{Localpart: "alice"}, &res)
			require.ErrorIs(t, err, test.err)
			require.Equal(t, test.err == nil, res.AccountDeactivated)
			require.Equal(t, test.want, s.calls)
			require.Empty(t, accounts.ending)
			require.Equal(t, test.failedAt == 2, logged.LastEntry() != nil, "a failure that the answer does not tell is logged")
		})
	}
}
