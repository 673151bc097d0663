package userapi

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/dendrite/userapi/storage"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

func TestMain(m *testing.M) { postgres.Main(m) }

const server = "example.org"

// open creates a database as Dendrite does, and opens it for Accounts too.
func open(t *testing.T, dsn string) (storage.UserDatabase, *Accounts) {
	t.Helper()
	options := &config.DatabaseOptions{ConnectionString: config.DataSource(dsn)}
	options.Defaults(10)
	cm := sqlutil.NewConnectionManager(nil, config.DatabaseOptions{})
	accounts, err := NewAccounts(cm, options, server)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, accounts.db.Close()) })
	db, err := storage.NewUserDatabase(t.Context(), cm, options, server, 4, 1000, time.Minute, "notices")
	require.NoError(t, err)
	return db, accounts
}

// An account of any kind is reported as deactivated if it is, and not before.
func TestAccounts(t *testing.T) {
	for name, dsn := range map[string]func() string{
		"SQLite":     func() string { return "file:" + filepath.Join(t.TempDir(), "accounts.db") },
		"PostgreSQL": func() string { return postgres.NewDatabase(t) },
	} {
		t.Run(name, func(t *testing.T) {
			db, accounts := open(t, dsn())
			is := func(userID string) bool {
				deactivated, err := accounts.Deactivated(t.Context(), userID)
				require.NoError(t, err)
				return deactivated
			}
			for localpart, kind := range map[string]api.AccountType{
				"user": api.AccountTypeUser, "admin": api.AccountTypeAdmin, "guest": api.AccountTypeGuest, "bridge_x": api.AccountTypeAppService,
			} {
				account, err := db.CreateAccount(t.Context(), localpart, server, "", "", kind)
				require.NoError(t, err)
				localpart, userID := account.Localpart, account.UserID // a guest gets another localpart
				require.False(t, is(userID))
				done := accounts.end(userID)
				doneAgain := accounts.end(userID)
				done()
				require.True(t, is(userID), "about to be")
				doneAgain()
				require.False(t, is(userID), "it failed")
				require.NoError(t, db.DeactivateAccount(t.Context(), localpart, server))
				require.True(t, is(userID))
				require.False(t, is("@"+localpart+":elsewhere.example.org"))
			}
			require.False(t, is("@nobody:"+server))
			_, err := accounts.Deactivated(t.Context(), "nobody")
			require.Error(t, err)
			require.Empty(t, accounts.ending)
			gone, cancel := context.WithCancel(t.Context())
			cancel()
			_, err = accounts.Deactivated(gone, "@user:"+server)
			require.ErrorIs(t, err, context.Canceled)
		})
	}
}
