"""What headers have in common, by version of the format: the dictionaries that their deflate streams begin with.

They are part of the format (SPEC.md) and never change within a version. That of version 3 holds whole headers of the small networks of the compression literature, whose
names and shapes were a twentieth of a file of 1.5 KB by that of version 2.
"""

from __future__ import annotations

_FIRST = (
    b'{"t":[["features.classifier.downsample.0.weight","linear.weight",[64,64,3,3],"q",'
    b'["layer3.1.bn2.running_var",[32],"f2",["layer2.1.bn1.running_mean",[16],"f2",["conv2.weight",[16,6,5,5],"q",'
    b'["fc1.weight",[120,400],"q",["conv1.bias",[6],"f2",]],"m":{"architecture":{"name":"resnet","kwargs":{"num_classes":1000'
    b',"name":"lenet5","kwargs":{"num_classes":10}},"classes":10,"input":{"shape":[3,224,224],"resize":256,"mean":[0.485,0.456,0.406],'
    b'"std":[0.229,0.224,0.225]},"input":{"shape":[1,28,28],"resize":null,"mean":[0.1307],"std":[0.3081]},"source":"'
)
_SECOND = (
    b'"airplane","automobile","bird","cat","deer","dog","frog","horse","ship","truck"]}}"class_names":["ties":{"dropped":["needs":['
    b'"name":"googlenet","name":"mobilenet_v2","name":"vgg16","name":"alexnet","name":"lenet_300_100","name":"lenet5_caffe","name":"lenet5",'
    b'"classes":1000,"kwargs":{"num_classes":1000}},"kwargs":{}},'
    b'"input":{"shape":[1,28,28],"resize":null,"mean":[0.1307],"std":[0.3081]}}}'
    b'"input":{"shape":[3,224,224],"resize":256,"mean":[0.485,0.456,0.406],"std":[0.229,0.224,0.225]}}}'
    b'"inception3a.branch2.1.conv.weight","features.0.weight","features.18.conv.1.0.weight","classifier.6.weight",'
    b'"fc2.weight","fc3.weight","conv2.weight","layer4.2.downsample.0.weight","layer3.0.conv3.weight","layer2.1.conv2.weight",'
    b"[128,128,3,3],[512,128,1,1],[256,256,3,3],[1024,256,1,1],[512,512,3,3],[2048,512,1,1],[120,400],[16,6,5,5],"
    b'[64,64,3,3],[64,32,3,3],[32,32,3,3],[32,16,3,3],[16,16,3,3],[16,3,3,3]]],"c":["q","qh","a","ah","mh","ah","mh","ah"],"k":"q","k":"a",'
    b'"b":[["layer4.0.bn3",512],["layer4.0.downsample.1",2048],["layer3.2.bn2",64],["layer2.2.bn1",32],["layer1.2.bn2",16]],'
    b'"v":[["conv1.bias",[6]],["fc1.bias",[120]],["classifier.6.bias",[1000]],["fc.bias",[1000]],["linear.bias",[10]]],'
    b'"m":{"architecture":{"name":"resnet50","kwargs":{"num_classes":10}},"classes":10,"input":{"shape":[3,32,32],"resize":null,"mean":[0.4,"std":[0.2'
    b'{"n":["conv1.weight","layer1.0.conv1.weight","layer1.0.conv2.weight","linear.weight"],"s":[['
)
_RESNET_20 = (
    b'{"n":["conv1.weight","layer1.0.conv1.weight","layer1.0.conv2.weight","layer1.1.conv1.weight",'
    b'"layer1.1.conv2.weight","layer1.2.conv1.weight","layer1.2.conv2.weight","layer2.0.conv1.weight",'
    b'"layer2.0.conv2.weight","layer2.1.conv1.weight","layer2.1.conv2.weight","layer2.2.conv1.weight",'
    b'"layer2.2.conv2.weight","layer3.0.conv1.weight","layer3.0.conv2.weight","layer3.1.conv1.weight",'
    b'"layer3.1.conv2.weight","layer3.2.conv1.weight","layer3.2.conv2.weight","linear.weight"],"s":[[16,3,3,3],[16,16,'
    b"3,3],[16,16,3,3],[16,16,3,3],[16,16,3,3],[16,16,3,3],[16,16,3,3],[32,16,3,3],[32,32,3,3],[32,32,3,3],[32,32,3,"
    b"3],[32,32,3,3],[32,32,3,3],[64,32,3,3],[64,64,3,3],[64,64,3,3],[64,64,3,3],[64,64,3,3],[64,64,3,3],[10,64]],"
    b'"c":["mh","mh","mth","mh","mh","mth","mth","mh","mh","mh","mth","mh","mth","mth","mth","mth","mth","mth","mth",'
    b'"mh"],"b":[["bn1",16],["layer1.0.bn1",16],["layer1.0.bn2",16],["layer1.1.bn1",16],["layer1.1.bn2",16],['
    b'"layer1.2.bn1",16],["layer1.2.bn2",16],["layer2.0.bn1",32],["layer2.0.bn2",32],["layer2.1.bn1",32],['
    b'"layer2.1.bn2",32],["layer2.2.bn1",32],["layer2.2.bn2",32],["layer3.0.bn1",64],["layer3.0.bn2",64],['
    b'"layer3.1.bn1",64],["layer3.1.bn2",64],["layer3.2.bn1",64],["layer3.2.bn2",64]],"v":[["linear.bias",[10]]],'
    b'"k":"m","m":{"architecture":{"name":"resnet20","kwargs":{"num_classes":10}},"classes":10,"input":{"shape":[3,32,'
    b'32],"resize":null,"mean":[0.485,0.456,0.406],"std":[0.229,0.224,0.225]},"class_names":["airplane","automobile",'
    b'"bird","cat","deer","dog","frog","horse","ship","truck"]}}'
)
_LENET_300_100 = (
    b'{"n":["fc1.weight","fc2.weight","fc3.weight"],"s":[[300,784],[100,300],[10,100]],"c":["mth","mth","mth"],"v":[['
    b'"fc1.bias",[300]],["fc2.bias",[100]],["fc3.bias",[10]]],"k":"m","m":{"architecture":{"name":"lenet_300_100",'
    b'"kwargs":{"num_classes":10}},"classes":10,"input":{"shape":[1,28,28],"resize":null,"mean":[0.1307],"std":['
    b"0.3081]}}}"
)
_LENET_5_CAFFE = (
    b'{"n":["conv1.weight","conv2.weight","fc1.weight","fc2.weight"],"s":[[20,1,5,5],[50,20,5,5],[500,800],[10,500]],'
    b'"c":["mh","mth","mth","mth"],"v":[["conv1.bias",[20]],["conv2.bias",[50]],["fc1.bias",[500]],["fc2.bias",[10]]],'
    b'"k":"m","m":{"architecture":{"name":"lenet5_caffe","kwargs":{"num_classes":10}},"classes":10,"input":{"shape":['
    b'1,28,28],"resize":null,"mean":[0.1307],"std":[0.3081]}}}'
)

DICTIONARIES = {1: _FIRST, 2: _SECOND, 3: _RESNET_20 + _SECOND + _LENET_300_100 + _LENET_5_CAFFE}
"""By version."""
