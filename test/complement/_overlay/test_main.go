// This file replaces Complement's test_main.go, which deploys servers with Docker. Its functions have the same signatures, but deploy
// processes.

package complement

import (
	"testing"

	"github.com/matrix-org/complement/b"
	"github.com/matrix-org/complement/ct"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/complement/deployer"
)

var deploy *deployer.Deployer

// TestMain runs the tests of a package.
func TestMain(m *testing.M, namespace string) {
	deployer.Run(m, namespace, func(d *deployer.Deployer) { deploy = d })
}

// Deploy starts servers with the names hs1, hs2 and so on.
func Deploy(t ct.TestLike, numServers int) Deployment {
	t.Helper()
	return deploy.Servers(t, numServers)
}

// OldDeploy starts the servers of a blueprint.
func OldDeploy(t ct.TestLike, blueprint b.Blueprint) Deployment {
	t.Helper()
	return deploy.Blueprint(t, blueprint)
}
